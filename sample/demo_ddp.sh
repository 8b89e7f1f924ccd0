#!/bin/bash
# Sample the shipped demo weights (assets/demo) on several processes; no GPU needed. After an
# interruption the same command continues.
#   GPUS=2 OUT=folder bash sample/demo_ddp.sh [further flags of sample_ddp.py, e.g. --num_videos 256 --seed 7]
exec bash "$(dirname "$0")/../train_scripts/launch.sh" sample/sample_ddp.py configs/demo/demo_sample.yaml \
    --save_video_path "${OUT:-results/demo_samples_64}" \
    --num_videos 64 --batch_size 8 \
    "$@"
