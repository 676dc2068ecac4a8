#!/usr/bin/env bash
# BLIP-2 with MAFA on 8 GPUs: all stages in order, each from the best checkpoint of the one before, or its last (MAFA Tables 7, 8 and 19).
#
#   bash run_scripts/blip2.sh      everything, below ./output/blip2
#   bash run_scripts/blip2.sh 4    from the fourth step on
#
# NPROC sets the number of GPUs; nocaps_val_4500_captions.json of nocaps.org must be in the working directory. The baseline's metrics in
# Tables 8 and 19 take the steps from stage 2 on, from the checkpoint of stage_1_blip2.
set -euo pipefail
first=${1:-1} step=0 out=output/blip2

run() { # train|evaluate YAML [KEY=VALUE ...]
    local task=$1 yaml=$2
    shift 2
    step=$((step + 1))
    if [ "$step" -ge "$first" ]; then
        echo "== step $step: $yaml"
        torchrun --nproc_per_node="${NPROC:-8}" -m lavis_mafa "$task" --cfg-path "$yaml" ${@:+--options "$@"}
    fi
}

run train mafa/blip2/train/stage_1_blip2.yaml
run train mafa/blip2/train/retrieval_coco.yaml model.pretrained=$out/stage_1_blip2/latest run.output_dir=$out/con_d # Con-D, and Table 7, row 1
run train mafa/blip2/train/stage_1.yaml model.discriminator.checkpoint=$out/con_d/latest
run train mafa/blip2/train/retrieval_coco.yaml model.pretrained=$out/stage_1/latest # Table 7, row 3
run train mafa/blip2/train/stage_2.yaml model.stage_1=$out/stage_1/latest
run evaluate mafa/blip2/eval/vqav2.yaml model.pretrained=$out/stage_2/latest # Table 8
run evaluate mafa/blip2/eval/okvqa.yaml model.pretrained=$out/stage_2/latest
run evaluate mafa/blip2/eval/gqa.yaml model.pretrained=$out/stage_2/latest
run evaluate mafa/blip2/eval/caption_coco_zero_shot.yaml model.pretrained=$out/stage_2/latest
run train mafa/blip2/train/caption_coco.yaml model.pretrained=$out/stage_2/latest # Table 19, with COCO's test split
run evaluate mafa/blip2/eval/nocaps.yaml model.pretrained=$out/caption_coco/latest
