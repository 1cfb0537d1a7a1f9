#!/usr/bin/env bash
# Sourced by dist_train.sh and dist_test.sh, which set TOOL and NAMES, the names of its positional arguments.
set -euo pipefail
N=${#NAMES[@]}
GPUS=${*:N+1:1}
if ! [[ $GPUS =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: [NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 PORT=29500] $0 ${NAMES[*]} GPUS [options of $TOOL.py]" >&2
    exit 2
fi

python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node-rank="${NODE_RANK:-0}" \
    --master-addr="${MASTER_ADDR:-127.0.0.1}" \
    --master-port="${PORT:-29500}" \
    --nproc-per-node="$GPUS" \
    "$HERE/$TOOL.py" "${@:1:N}" --launcher pytorch "${@:N+2}"
