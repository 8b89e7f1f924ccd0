#!/bin/bash
# launch.sh SCRIPT CONFIG [key=value ...]: torchrun on GPUS processes of this machine, by default one
# per GPU, or a single one on the CPU. Each start uses a free port.
#   MAX_RESTARTS=3          restarts after a crash; each continues the newest checkpoint
#   SHUTDOWN_TIMEOUT=240    seconds that a signal leaves for saving
# Several machines, the same command on each: NNODES, NODE_RANK (0 on HEAD_NODE), HEAD_NODE, RDZV_PORT, RDZV_ID.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # of `make setup`, if it exists

script=$1 config=$2
shift 2
found=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
where=(--standalone)
if [ "${NNODES:-1}" != 1 ]; then
    [ "${NODE_RANK:-$SLURM_NODEID}" = 0 ] && is_host=true || is_host=false
    where=(--nnodes="$NNODES" --rdzv-backend=c10d --rdzv-endpoint="$HEAD_NODE:$RDZV_PORT" --rdzv-id="$RDZV_ID")
    where+=(--rdzv-conf="is_host=$is_host")
fi
exec python -m engine.elastic "${where[@]}" --nproc_per_node="${GPUS:-$((found > 0 ? found : 1))}" \
    --max-restarts="${MAX_RESTARTS:-3}" --shutdown-timeout="${SHUTDOWN_TIMEOUT:-240}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    "$script" --config "$config" "$@"
