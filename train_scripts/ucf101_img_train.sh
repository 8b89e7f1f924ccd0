#!/bin/bash
# Train on UCF101 (video and images, jointly), or continue that run:
#   GPUS=8 bash train_scripts/ucf101_img_train.sh data.path=/path/to/data [key=value ...]
exec bash "$(dirname "$0")/launch.sh" train_with_img.py configs/ucf101/ucf101_img_train.yaml "$@"
