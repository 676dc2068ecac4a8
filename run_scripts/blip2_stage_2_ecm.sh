#!/usr/bin/env bash
# BLIP-2 stage 2 on mined pairs, 8 GPUs: run_scripts/blip2_stage_2_ecm.sh model.stage_1=STAGE_1.pth (NPROC sets the number of GPUs)
set -euo pipefail
exec torchrun --nproc_per_node="${NPROC:-8}" -m lavis_mafa train --cfg-path mafa/blip2/train/stage_2_ecm.yaml ${@:+--options "$@"}
