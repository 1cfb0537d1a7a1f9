#!/usr/bin/env bash
# Sourced by slurm_train.sh and slurm_test.sh, which set TOOL, NAMES, the names of its positional arguments, and SIGNAL.
set -euo pipefail
N=${#NAMES[@]}
if [ $# -lt $((N + 2)) ]; then
    echo "usage: [GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SRUN_ARGS=] $0 PARTITION JOB_NAME ${NAMES[*]} [options of $TOOL.py]" >&2
    exit 2
fi
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}

# SRUN_ARGS is a list of words.
# shellcheck disable=SC2086
srun --partition="$1" \
    --job-name="$2" \
    --gres=gpu:"$GPUS_PER_NODE" \
    --ntasks="$GPUS" \
    --ntasks-per-node="$GPUS_PER_NODE" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    "${SIGNAL[@]}" \
    ${SRUN_ARGS:-} \
    python -u "$HERE/$TOOL.py" "${@:3:N}" --launcher slurm "${@:N+3}"
