#!/bin/bash
# Train on UCF101 (video), or continue that run:
#   GPUS=8 bash train_scripts/ucf101_train.sh data.path=/path/to/data [key=value ...]
exec bash "$(dirname "$0")/launch.sh" train.py configs/ucf101/ucf101_train.yaml "$@"
