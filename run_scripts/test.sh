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

# Later releases of transformers, for tests/runs/test_newer_transformers.py: each in a folder that it puts before the environment's own.
install_newer() { # transformers==VERSION tokenizers==VERSION
    local folder=$venv/${1/==/-}
    [ -e "$folder" ] && return
    rm -rf "$folder.part"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target "$folder.part" "$@" &&
        mv "$folder.part" "$folder"
}
jobs=()
while read -r releases; do
    # shellcheck disable=SC2086
    install_newer $releases &
    jobs+=($!)
done <"$root/run_scripts/constraints/newer.txt"
for job in "${jobs[@]}"; do
    wait "$job" || die "A release of run_scripts/constraints/newer.txt could not be installed."
done

# threads that wait by spinning take the cores from each other: see docs/decisions.md
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1
cd "$root"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
"$venv/bin/python" -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"  # a file stays on one core: its fixtures are built once
