#!/bin/bash
# Sample videos from text with Latte-1: a folder in diffusers format, or a hub name.
#   MODEL=path/to/Latte-1 OUT=folder bash sample/t2v.sh [--prompt "a cat" and further flags of sample_t2x.py]
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # from `make setup`, if it exists

python sample/sample_t2x.py \
    --config configs/t2x/t2v_sample.yaml \
    --pretrained_model_path "${MODEL:-maxin-cn/Latte-1}" \
    --save_img_path "${OUT:-results/t2v}" \
    "$@"
