#!/usr/bin/env bash
# A pre-trained ALBEF on each task of MAFA Table 3 and on SNLI-VE, with the papers' total batch sizes, and the row that comes out.
#
#   bash run_scripts/albef_downstream.sh PRETRAINED.pth            NPROC GPUs (1, 2, 4, 8, 16; default 8), below output/downstream
#   bash run_scripts/albef_downstream.sh scenes_start --scenes     the same tasks on scenes (lavis-mafa build-scenes data/scenes), on a CPU
#
# OUT=FOLDER: elsewhere. What is there already is not trained again; a folder is for one checkpoint.
set -euo pipefail
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="${TORCH_ALLOW_TF32_CUBLAS_OVERRIDE:-1}" # TF32, as the authors' PyTorch multiplied fp32
start=$1 out=${OUT:-output/downstream} processes=${NPROC:-8}
if [ "${2:-}" = --scenes ]; then out=${OUT:-output/downstream_scenes} processes=1; fi
if [ -e "$out/of" ] && [ "$(cat "$out/of")" != "$start" ]; then
    echo "$out is of $(cat "$out/of"), not of $start: name another folder, OUT=FOLDER." >&2
    exit 2
fi
mkdir -p "$out"
printf '%s' "$start" >"$out/of"

run() { # NAME YAML START PAIRS_A_STEP
    local of_each=()
    if [ -e "$out/$1/done" ]; then return; fi
    if [ -n "${4:-}" ]; then of_each=("run.batch_size_train=$(($4 / processes))"); fi
    echo "== $1: $2"
    torchrun --nproc_per_node="$processes" -m lavis_mafa train --cfg-path "$2" \
        --options "model.pretrained=$3" "run.output_dir=$out/$1" "${of_each[@]}"
    touch "$out/$1/done"
}

if [ "${2:-}" = --scenes ]; then
    run ve mafa/quickstart/scenes/entailment.yaml "$start"
    run nlvr_ta mafa/quickstart/scenes/statements_ta.yaml "$start"
    run nlvr mafa/quickstart/scenes/statements.yaml "$out/nlvr_ta/latest"
    run vqa mafa/quickstart/scenes/questions.yaml "$start"
else
    run coco mafa/albef/train/2_discriminator_finetune_coco.yaml "$start" 256
    run flickr mafa/albef/train/finetune_flickr.yaml "$start" 256
    run nlvr_ta mafa/albef/finetune/nlvr_ta.yaml "$start" 256
    run nlvr mafa/albef/finetune/nlvr.yaml "$out/nlvr_ta/latest" 64
    run vqa mafa/albef/finetune/vqa.yaml "$start" 128
    run ve mafa/albef/finetune/snli_ve.yaml "$start" 256
fi

python - "$out" <<'EOF'
import json
import sys
from pathlib import Path

COLUMNS = [
    ("COCO TR", "coco", "test", "tr_r1"),
    ("COCO IR", "coco", "test", "ir_r1"),
    ("Flickr TR", "flickr", "test", "tr_r1"),
    ("Flickr IR", "flickr", "test", "ir_r1"),
    ("NLVR2 dev", "nlvr", "val", "accuracy"),
    ("test-P", "nlvr", "test", "accuracy"),
    ("VQA val", "vqa", "val", "accuracy"),
    ("test", "vqa", "test", "accuracy"),
    ("SNLI-VE val", "ve", "val", "accuracy"),
    ("test", "ve", "test", "accuracy"),
]
row = []
for _, name, split, metric in COLUMNS:
    file = Path(sys.argv[1], name, "latest", "evaluation.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    of_split = [record[metric] for record in records if record["split"] == split and metric in record]
    best = max(of_split) if split == "val" and of_split else of_split[-1] if of_split else None  # the best epoch on val is tested
    row.append("-" if best is None else f"{best:.2f}")
print("\n" + "  ".join(f"{title:>11}" for title, *_ in COLUMNS))
print("  ".join(f"{figure:>11}" for figure in row))
for file in sorted(Path(sys.argv[1], "vqa", "latest", "result").glob("test*_vqa_result.json")):
    print(f"\nVQA2's test-dev and test-std are scored by EvalAI: submit {file}")
EOF
