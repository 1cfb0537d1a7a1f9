#!/usr/bin/env bash
# Test under SLURM; if a process dies, all end.
HERE=$(dirname "$(readlink -f "$0")")
TOOL=test NAMES=(CONFIG CHECKPOINT) SIGNAL=()
source "$HERE/slurm.sh"
