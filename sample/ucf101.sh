#!/bin/bash
# Sample UCF101 from a checkpoint: an official .pt, or one of our checkpoint or run folders.
#   CKPT=path/to/checkpoint OUT=folder bash sample/ucf101.sh [further flags of sample.py]
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # from `make setup`, if it exists

python sample/sample.py \
    --config configs/ucf101/ucf101_sample.yaml \
    --ckpt "${CKPT:-share_ckpts/ucf101.pt}" \
    --save_video_path "${OUT:-results/ucf101_samples}" \
    "$@"
