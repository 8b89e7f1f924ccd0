#!/bin/bash
# launch.sh SCRIPT CONFIG [key=value ...]: torchrun on GPUS processes of this machine, by default one
# for each of its GPUs, or a single one on the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # what `make setup` made, where it did

script=$1 config=$2
shift 2
found=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
exec torchrun --standalone --nproc_per_node="${GPUS:-$((found > 0 ? found : 1))}" "$script" --config "$config" "$@"
