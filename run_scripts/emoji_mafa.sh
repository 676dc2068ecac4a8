#!/usr/bin/env bash
# The chain of albef_mafa.sh at emoji size: Con-D in two halves, then MAFA; six minutes on two cores, below ./output/quickstart.
# `lavis-mafa quickstart` does the same, trains plain GRIT beside it and writes a page that compares them.
#
#   bash run_scripts/emoji_mafa.sh run.seed=43    arguments are KEY=VALUE for all three
set -euo pipefail

run() { # YAML [KEY=VALUE ...]
    local yaml=$1
    shift
    echo "== $yaml"
    lavis-mafa train --cfg-path "$yaml" ${@:+--options "$@"}
}

out=output/quickstart
lavis-mafa build-emoji data/emoji
run mafa/quickstart/train/con_d_1.yaml "$@"
half=$out/con_d_1/latest # grouped batches start from here: a matching head learns nothing from hardest negatives at the very start
run mafa/quickstart/train/con_d_2.yaml model.pretrained=$half "$@"
run mafa/quickstart/train/mafa.yaml model.pretrained=$half model.discriminator.checkpoint=$out/con_d_2/latest "$@"
