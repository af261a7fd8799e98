#!/usr/bin/env bash
# Sets up, then lints, checks types and spelling, and runs the tests on two cores.
#   bash launch/test.sh -m slow        the longer tests
#   PYTHON=python3.12 bash launch/test.sh
set -euo pipefail
. "$(dirname "$0")/setup.sh"
ruff check .
ruff format --check .
codespell
pyright
python -m pytest --numprocesses=2 --dist=loadfile "$@"
