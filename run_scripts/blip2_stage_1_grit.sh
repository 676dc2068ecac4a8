#!/usr/bin/env bash
# BLIP-2 stage 1 with GRIT alone on 8 GPUs: run_scripts/blip2_stage_1_grit.sh run.output_dir=output/mine (NPROC sets the number of GPUs)
set -euo pipefail
exec torchrun --nproc_per_node="${NPROC:-8}" -m lavis_mafa train --cfg-path mafa/blip2/train/stage_1_grit.yaml ${@:+--options "$@"}
