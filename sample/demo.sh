#!/bin/bash
# Sample the shipped demo weights (assets/demo); no GPU needed.
#   OUT=folder bash sample/demo.sh [further flags of sample.py, e.g. --labels 0,3 --seed 7]
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # from `make setup`, if it exists

python sample/sample.py \
    --config configs/demo/demo_sample.yaml \
    --save_video_path "${OUT:-results/demo_samples}" \
    "$@"
