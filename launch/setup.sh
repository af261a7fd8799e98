#!/usr/bin/env bash
# Sourced by the other scripts: makes .venv at the top of the checkout, with the tested versions, once.
# PYTHON=python3.12 chooses the interpreter; another one than .venv has replaces it.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
if [ -n "${PYTHON:-}" ] && [ -x .venv/bin/python ] && [ "$(.venv/bin/python -V)" != "$("$PYTHON" -V)" ]; then
  rm -rf .venv
fi
if ! cmp -s requirements-lock.txt .venv/installed.txt; then
  echo "setting up .venv (a few minutes, once)"
  "${PYTHON:-$(command -v python3.11 || command -v python3)}" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-lock.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
  cp requirements-lock.txt .venv/installed.txt
fi
export PATH="$PWD/.venv/bin:$PATH"
