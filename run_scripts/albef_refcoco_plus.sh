#!/usr/bin/env bash
# Grounding on RefCOCO+ from a pre-trained ALBEF on 8 GPUs: run_scripts/albef_refcoco_plus.sh model.pretrained=PRETRAINED.pth (NPROC sets the number of GPUs)
set -euo pipefail
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="${TORCH_ALLOW_TF32_CUBLAS_OVERRIDE:-1}" # TF32, as the authors' PyTorch multiplied fp32
exec torchrun --nproc_per_node="${NPROC:-8}" -m lavis_mafa train --cfg-path mafa/albef/finetune/refcoco_plus.yaml ${@:+--options "$@"}
