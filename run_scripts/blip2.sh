#!/usr/bin/env bash
# BLIP-2 with MAFA on 8 GPUs: all stages in order, each from the newest checkpoint of the one before (MAFA Tables 7, 8 and 19).
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

newest() { # the newest run's best checkpoint, or its last one
    local folder
    folder=$(ls -d "$out/$1"/*/ | tail -n 1) || return
    ls "$folder"checkpoint_best.pth 2>/dev/null || python -m lavis_mafa.files "$folder"
}

run train mafa/blip2/train/stage_1_blip2.yaml
start=$(newest stage_1_blip2)
run train mafa/blip2/train/retrieval_coco.yaml model.pretrained="$start" run.output_dir=$out/con_d # Con-D, and Table 7, row 1
con_d=$(newest con_d)
run train mafa/blip2/train/stage_1.yaml model.discriminator.checkpoint="$con_d"
stage_1=$(newest stage_1)
run train mafa/blip2/train/retrieval_coco.yaml model.pretrained="$stage_1" # Table 7, row 3
run train mafa/blip2/train/stage_2.yaml model.stage_1="$stage_1"
stage_2=$(newest stage_2)
run evaluate mafa/blip2/eval/vqav2.yaml model.pretrained="$stage_2" # Table 8
run evaluate mafa/blip2/eval/okvqa.yaml model.pretrained="$stage_2"
run evaluate mafa/blip2/eval/gqa.yaml model.pretrained="$stage_2"
run evaluate mafa/blip2/eval/caption_coco_zero_shot.yaml model.pretrained="$stage_2"
run train mafa/blip2/train/caption_coco.yaml model.pretrained="$stage_2" # Table 19, with COCO's test split
captions=$(newest caption_coco)
run evaluate mafa/blip2/eval/nocaps.yaml model.pretrained="$captions"
