#!/bin/bash
# Scores generated videos (official script name); docs/datasets_evaluation.md explains the flags.
#   REAL=folder FAKE=folder bash tools/eval_metrics.sh [further flags of tools.calc_metrics_for_dataset]
# GPUS: number of processes; PROTOCOL, DATASET, METRICS: flags of these names; DETECTORS: folder of detector files.
# Paths are relative to the current folder.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PATH="$root/.venv/bin:$PATH" PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [ -z "${REAL:-}" ] || [ -z "${FAKE:-}" ]; then
    echo "error: set REAL and FAKE to the folders of real and generated videos: REAL=folder FAKE=folder bash $0" >&2
    exit 2
fi

python -m engine.elastic --standalone --nproc_per_node="${GPUS:-1}" -m tools.calc_metrics_for_dataset \
    --real_data_path "$REAL" \
    --fake_data_path "$FAKE" \
    --metrics "${METRICS:-fvd2048_16f,fid50k_full}" \
    --protocol "${PROTOCOL:-latte}" \
    --detector_dir "${DETECTORS:-share_ckpts/detectors}" \
    ${DATASET:+--dataset "$DATASET"} \
    "$@"
