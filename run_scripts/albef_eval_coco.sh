#!/usr/bin/env bash
# Retrieval on COCO: run_scripts/albef_eval_coco.sh model.pretrained=CHECKPOINT.pth (NPROC sets the number of GPUs)
set -euo pipefail
exec torchrun --nproc_per_node="${NPROC:-1}" -m lavis_mafa evaluate --cfg-path mafa/albef/eval/retrieval_coco.yaml ${@:+--options "$@"}
