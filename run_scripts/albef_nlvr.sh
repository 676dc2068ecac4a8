#!/usr/bin/env bash
# NLVR2 from a pre-trained ALBEF on 4 GPUs, text assignment first (MAFA Table 3): run_scripts/albef_nlvr.sh PRETRAINED.pth [KEY=VALUE ...]
# NPROC sets the number of GPUs, OUT the folder (output/albef); the options are for both steps.
set -euo pipefail
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="${TORCH_ALLOW_TF32_CUBLAS_OVERRIDE:-1}" # TF32, as the authors' PyTorch multiplied fp32
start=$1 out=${OUT:-output/albef}
shift

run() { # YAML KEY=VALUE ...
    local yaml=$1
    shift
    torchrun --nproc_per_node="${NPROC:-4}" -m lavis_mafa train --cfg-path "$yaml" --options "$@"
}

run mafa/albef/finetune/nlvr_ta.yaml model.pretrained="$start" "$@" run.output_dir=$out/nlvr_ta
run mafa/albef/finetune/nlvr.yaml model.pretrained=$out/nlvr_ta/latest "$@" run.output_dir=$out/nlvr
