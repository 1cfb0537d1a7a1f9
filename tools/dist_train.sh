#!/usr/bin/env bash
# Train on the GPUs of this machine, or of several machines: start it on each, with NNODES, NODE_RANK and MASTER_ADDR.
HERE=$(dirname "$(readlink -f "$0")")
TOOL=train NAMES=(CONFIG)
source "$HERE/dist.sh"
