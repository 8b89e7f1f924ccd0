#!/bin/bash
# Score generated videos, under the official name and with its flags; docs/datasets_evaluation.md says what they mean.
#   REAL=folder FAKE=folder bash tools/eval_metrics.sh [further flags of tools/calc_metrics_for_dataset.py]
# GPUS=8 uses so many; PROTOCOL, DATASET and METRICS choose; DETECTORS is the folder of the detectors' files.
# Paths are those of the folder that it is called from.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
PATH="$root/.venv/bin:$PATH" # what `make setup` made, where it did

torchrun --standalone --nproc_per_node="${GPUS:-1}" "$root/tools/calc_metrics_for_dataset.py" \
    --real_data_path "${REAL:?the folder or zip of real videos}" \
    --fake_data_path "${FAKE:?the folder or zip of generated videos}" \
    --metrics "${METRICS:-fvd2048_16f,fid50k_full}" \
    --protocol "${PROTOCOL:-latte}" \
    --detector_dir "${DETECTORS:-share_ckpts/detectors}" \
    ${DATASET:+--dataset "$DATASET"} \
    "$@"
