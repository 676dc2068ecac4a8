#!/usr/bin/env bash
# From a fresh clone to a first result: installs into .venv, then trains random batches, GRIT and MAFA on scenes and compares them.
#
#   bash run_scripts/quickstart.sh                      results below ./quickstart
#   bash run_scripts/quickstart.sh --folder elsewhere   other flags: .venv/bin/lavis-mafa quickstart --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

install quickstart
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 # nothing is fetched at run time
exec "$venv/bin/lavis-mafa" quickstart "$@"
