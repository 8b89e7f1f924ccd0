#!/bin/bash
# Sample SkyTimelapse for metrics on all GPUs: 2048 videos from an official .pt, or one of our checkpoints or runs.
# After an interruption the same command continues.
#   GPUS=8 CKPT=path/to/checkpoint OUT=folder bash sample/sky_ddp.sh [further flags of sample_ddp.py]
exec bash "$(dirname "$0")/../train_scripts/launch.sh" sample/sample_ddp.py configs/sky/sky_sample.yaml \
    --ckpt "${CKPT:-share_ckpts/skytimelapse.pt}" \
    --save_video_path "${OUT:-results/sky_samples_2048}" \
    --num_videos 2048 \
    "$@"
