#!/usr/bin/env bash
# Test on the GPUs of this machine, or of several machines: start it on each, with NNODES, NODE_RANK and MASTER_ADDR.
set -euo pipefail
if ! [[ ${3:-} =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: [NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 PORT=29500] $0 CONFIG CHECKPOINT GPUS [options of test.py]" >&2
    exit 2
fi
CONFIG=$1
CHECKPOINT=$2
GPUS=$3

python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node-rank="${NODE_RANK:-0}" \
    --master-addr="${MASTER_ADDR:-127.0.0.1}" \
    --master-port="${PORT:-29500}" \
    --nproc-per-node="$GPUS" \
    "$(dirname "$(readlink -f "$0")")/test.py" "$CONFIG" "$CHECKPOINT" --launcher pytorch "${@:4}"
