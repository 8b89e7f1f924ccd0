#!/bin/bash
# Train on Taichi-HD (video and images, jointly), or continue that run:
#   GPUS=8 bash train_scripts/taichi_img_train.sh data.path=/path/to/data [key=value ...]
exec bash "$(dirname "$0")/launch.sh" train_with_img.py configs/taichi/taichi_img_train.yaml "$@"
