#!/usr/bin/env bash
# SoftMask on 8 GPUs: run_scripts/albef_softmask.sh run.output_dir=output/mine (NPROC sets the number of GPUs)
set -euo pipefail
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="${TORCH_ALLOW_TF32_CUBLAS_OVERRIDE:-1}" # TF32, as the authors' PyTorch multiplied fp32
exec torchrun --nproc_per_node="${NPROC:-8}" -m lavis_mafa train --cfg-path mafa/albef/train/softmask.yaml ${@:+--options "$@"}
