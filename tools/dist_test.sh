#!/usr/bin/env bash
# Test on the GPUs of this machine, or of several machines: start it on each, with NNODES, NODE_RANK and MASTER_ADDR.
HERE=$(dirname "$(readlink -f "$0")")
TOOL=test NAMES=(CONFIG CHECKPOINT)
source "$HERE/dist.sh"
