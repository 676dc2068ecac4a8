#!/usr/bin/env bash
# ALBEF with MAFA on 4 GPUs: Con-D in two halves, MAFA, and its metrics on COCO and Flickr30K (MAFA Tables 3 and 4), each stage from the
# best checkpoint of the one before, or its last. In fp32, multiplied in TF32, as the authors' PyTorch did.
#
#   bash run_scripts/albef_mafa.sh      everything, below ./output/albef
#   bash run_scripts/albef_mafa.sh 3    from the third step on
#
# NPROC sets the number of GPUs. The same chain on emoji, in minutes on a CPU: run_scripts/emoji_mafa.sh.
set -euo pipefail
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="${TORCH_ALLOW_TF32_CUBLAS_OVERRIDE:-1}"
first=${1:-1} step=0 out=output/albef

run() { # YAML [KEY=VALUE ...]
    local yaml=$1
    shift
    step=$((step + 1))
    if [ "$step" -ge "$first" ]; then
        echo "== step $step: $yaml"
        torchrun --nproc_per_node="${NPROC:-4}" -m lavis_mafa train --cfg-path "$yaml" ${@:+--options "$@"}
    fi
}

run mafa/albef/train/1_discriminator_pretrain.yaml
run mafa/albef/train/2_discriminator_finetune_coco.yaml model.pretrained=$out/con_d_pretrain/latest # Con-D, and Table 4, row 3
run mafa/albef/train/pretrain.yaml model.discriminator.checkpoint=$out/con_d/latest
run mafa/albef/train/2_discriminator_finetune_coco.yaml model.pretrained=$out/mafa/latest run.output_dir=$out/mafa_coco # Table 4, row 4
run mafa/albef/train/finetune_flickr.yaml model.pretrained=$out/mafa/latest
