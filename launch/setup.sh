#!/usr/bin/env bash
# Makes .venv at the top of the checkout once, with the tested versions, without root.  Run it; only the other scripts source it.
#   PYTHON=python3.12     the interpreter
#   ACCELERATOR=cuda13    cpu, cuda12, cuda13 or tpu; default: what this machine has
#   KEEP_VENV=1           never make or rebuild .venv, which other jobs may be using: end with one line instead
# .venv is rebuilt for another interpreter or accelerator, unless it works here as it is, as one with CUDA does on the login
# node of a cluster.  If no Python is new enough, uv fetches one.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

_accelerator_here() { # prints cuda12, cuda13, tpu, or nothing
  local driver device ids
  # NVIDIA drivers from 525 on run CUDA 12, from 580 on also CUDA 13: docs.jax.dev/en/latest/installation.html.
  driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2> /dev/null | head -n 1)" || driver=""
  if [[ "$driver" =~ ^([0-9]+)\. ]]; then echo "cuda$((BASH_REMATCH[1] >= 580 ? 13 : 12))"; return; fi
  # Vendor and device ids as in jax/_src/hardware_utils.py: v3, v4, v5p, v5e, v6e, v7.  Network cards share the vendor.
  for device in "${PCI_DEVICES:-/sys/bus/pci/devices}"/*; do
    ids="$(cat "$device/vendor" "$device/device" 2> /dev/null | tr -d '\n')" || ids=""
    if [[ "$ids" =~ ^0x1ae00x00(27|56|5e|62|63|6f|76)$ ]]; then echo tpu; return; fi
  done
}
_python_here() { # prints an interpreter that is new enough and can make environments, or nothing
  local name
  for name in python3.11 python3 python3.12 python3.13; do
    if "$name" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then echo "$name"; return; fi
  done
}
_make_venv() {
  local python="${PYTHON:-$(_python_here)}" fetched
  if [ -n "$python" ]; then "$python" -m venv .venv || return; else
    fetched="$(mktemp -d)" && python3 -m pip install --quiet --target "$fetched" uv &&
      "$fetched/bin/uv" venv --quiet --seed --clear --python 3.11 .venv || return
  fi
  set -- .venv/bin/python -m pip install --quiet --disable-pip-version-check
  "$@" -r requirements-lock.txt || return
  if [ "$_accelerator" = cpu ]; then "$@" --no-deps --editable .; else
    "$@" --constraint requirements-lock.txt --editable ".[$_accelerator]"
  fi
}
_made_from() { cat requirements-lock.txt; [ "$_accelerator" = cpu ] || echo "# accelerator: $_accelerator"; }
_old() { sed -n 's/^# accelerator: //p' .venv/installed.txt 2> /dev/null || true; } # prints nothing for cpu
_other() { # whether .venv is for another accelerator, or of another interpreter
  [ -x .venv/bin/python ] && { [ "$(_old)" != "${_accelerator#cpu}" ] ||
    [ "${PYTHON:+$(.venv/bin/python -V)}" != "${PYTHON:+$("$PYTHON" -V)}" ]; }
}
_stale() { _other || ! _made_from | cmp -s - .venv/installed.txt; }
_accelerator="${ACCELERATOR:-$(_accelerator_here)}"
case "${ACCELERATOR:+given} $_accelerator $(_old)" in " cuda13 cuda12" | "  "*) _accelerator="$(_old)" ;; esac # it works here
[[ "${_accelerator:=cpu}" =~ ^(cpu|cuda12|cuda13|tpu)$ ]] ||
  { echo "ACCELERATOR=$_accelerator: expected cpu, cuda12, cuda13 or tpu" >&2; exit 1; }
if _stale; then
  [ -z "${KEEP_VENV:-}" ] || { echo ".venv is missing, old, or not for $_accelerator: ACCELERATOR=$_accelerator bash launch/setup.sh, while no job runs" >&2; exit 1; }
  ( # one script at a time; macOS has no flock
    if command -v flock > /dev/null; then flock 9; fi
    _stale || exit 0 # another script has made it meanwhile
    if _other; then rm -rf .venv; fi
    echo "setting up .venv for $_accelerator (a few minutes, once)"
    _make_venv && _made_from > .venv/installed.txt
  ) 9> .venv.lock || { echo "setup.sh: .venv could not be made: see above" >&2; exit 1; }
fi
export PATH="$PWD/.venv/bin:$PATH"
