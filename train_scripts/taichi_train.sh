#!/bin/bash
# Train on Taichi-HD (video), or continue that run:
#   GPUS=8 bash train_scripts/taichi_train.sh data.path=/path/to/data [key=value ...]
exec bash "$(dirname "$0")/launch.sh" train.py configs/taichi/taichi_train.yaml "$@"
