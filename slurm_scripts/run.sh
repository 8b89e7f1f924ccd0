#!/bin/bash
# run.sh SCRIPT CONFIG [key=value ...]: train_scripts/launch.sh on every node of a Slurm job. Started by
# the *.slurm files; see docs/clusters.md.
#   USR1 (five minutes before the time limit) or TERM (pre-emption) -> the run saves and stops
#   tools/requeue.py then decides from the marker that the run left whether to requeue the job
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

script=$1 config=$2
shift 2
require() { # NAME PATTERN: checks a value from Slurm before it is used in a command
    [[ ${!1:-} =~ ^$2$ ]] && return
    printf 'error: %s=%q is not a value that Slurm sets; start this script with sbatch.\n' "$1" "${!1:-}" >&2
    exit 2
}
export NNODES=${SLURM_NNODES:-1}
require SLURM_JOB_ID '[0-9]+'
require NNODES '[0-9]+'
export RDZV_ID=$SLURM_JOB_ID RDZV_PORT=$((10000 + 10#$SLURM_JOB_ID % 20000)) # jobs that share a node differ
if [ "$NNODES" != 1 ]; then
    HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    require HEAD_NODE '[[:alnum:]][[:alnum:]._-]*'
    export HEAD_NODE
fi

output=results/$(basename "$config" .yaml)
for argument; do
    [[ $argument != train.output_dir=* ]] || output=${argument#*=}
done
rm -f -- "$output/PREEMPTED" "$output/COMPLETED" # of an earlier session

child='' signalled=''
pass_on() {
    signalled=--signalled
    kill -USR1 "$child" 2>/dev/null || true # never TERM: srun would kill its tasks
}
trap pass_on USR1 TERM
srun --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    --kill-on-bad-exit=0 --wait=60 \
    bash train_scripts/launch.sh "$script" "$config" "$@" "train.output_dir=$output" &
child=$!
[ -z "$signalled" ] || pass_on # the signal came before the child had a process id
while kill -0 "$child" 2>/dev/null; do
    wait "$child" || true # a signal interrupts it
done
trap '' USR1 TERM
exec python -m tools.requeue "$output" "$SLURM_JOB_ID" $signalled
