#!/usr/bin/env bash
# Train under SLURM; if a process dies, all end, and shortly before the time is up, a checkpoint is written.
HERE=$(dirname "$(readlink -f "$0")")
TOOL=train NAMES=(CONFIG) SIGNAL=(--signal=USR1@120)
source "$HERE/slurm.sh"
