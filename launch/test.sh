#!/usr/bin/env bash
# Sets up, then lints and runs the tests.  bash launch/test.sh -m slow runs the longer ones.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
ruff check .
ruff format --check .
python -m pytest "$@"
