#!/usr/bin/env bash
# Installs into .venv, then checks style and types and runs the tests.
#
#   bash run_scripts/test.sh                   everything
#   bash run_scripts/test.sh --fast            without tests marked slow or ranks: under three minutes
#   bash run_scripts/test.sh tests/grit -x     arguments go to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

if [ "${1:-}" = --fast ]; then
    shift
    set -- -m "not slow and not ranks" "$@"
fi
install dev
# threads that wait by spinning take the cores from each other: see docs/decisions.md
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1
cd "$root"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
"$venv/bin/python" -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"  # a file stays on one core: its fixtures are built once
