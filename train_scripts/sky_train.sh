#!/bin/bash
# Train on SkyTimelapse (video), or continue that run:
#   GPUS=8 bash train_scripts/sky_train.sh data.path=/path/to/data [key=value ...]
exec bash "$(dirname "$0")/launch.sh" train.py configs/sky/sky_train.yaml "$@"
