#!/usr/bin/env bash
# Visual entailment from a pre-trained ALBEF on 8 GPUs: run_scripts/albef_snli_ve.sh model.pretrained=PRETRAINED.pth (NPROC sets the number of GPUs)
set -euo pipefail
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="${TORCH_ALLOW_TF32_CUBLAS_OVERRIDE:-1}" # TF32, as the authors' PyTorch multiplied fp32
exec torchrun --nproc_per_node="${NPROC:-8}" -m lavis_mafa train --cfg-path mafa/albef/finetune/snli_ve.yaml ${@:+--options "$@"}
