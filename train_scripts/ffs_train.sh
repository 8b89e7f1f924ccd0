#!/bin/bash
# Train on FaceForensics (video), or continue that run:
#   GPUS=8 bash train_scripts/ffs_train.sh data.path=/path/to/data [key=value ...]
exec bash "$(dirname "$0")/launch.sh" train.py configs/ffs/ffs_train.yaml "$@"
