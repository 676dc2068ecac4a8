#!/usr/bin/env bash
# MAFA on 4 GPUs: run_scripts/albef_mafa_pretrain.sh model.discriminator.checkpoint=CON_D.pth (NPROC sets the number of GPUs)
set -euo pipefail
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="${TORCH_ALLOW_TF32_CUBLAS_OVERRIDE:-1}" # TF32, as the authors' PyTorch multiplied fp32
exec torchrun --nproc_per_node="${NPROC:-4}" -m lavis_mafa train --cfg-path mafa/albef/train/pretrain.yaml ${@:+--options "$@"}
