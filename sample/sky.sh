#!/bin/bash
# Sample SkyTimelapse from a checkpoint: an official .pt, or one of our checkpoint or run folders.
#   CKPT=path/to/checkpoint OUT=folder bash sample/sky.sh [further flags of sample.py]
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # from `make setup`, if it exists

python sample/sample.py \
    --config configs/sky/sky_sample.yaml \
    --ckpt "${CKPT:-share_ckpts/skytimelapse.pt}" \
    --save_video_path "${OUT:-results/sky_samples}" \
    "$@"
