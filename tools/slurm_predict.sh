#!/usr/bin/env bash
# Predict under SLURM, in an array of jobs that share the files out. One that is killed or requeued goes on where it was.
set -euo pipefail
HERE=$(dirname "$(readlink -f "$0")")
if [ $# -lt 5 ]; then
    echo "usage: [SHARDS=8 GPUS_PER_SHARD=1 CPUS_PER_TASK=5 SBATCH_ARGS=] $0 PARTITION JOB_NAME CONFIG CHECKPOINT INPUT … --out DIR [options of predict.py]" >&2
    exit 2
fi

# SBATCH_ARGS is a list of words.
# shellcheck disable=SC2086
sbatch --partition="$1" \
    --job-name="$2" \
    --array=1-"${SHARDS:-8}" \
    --gres=gpu:"${GPUS_PER_SHARD:-1}" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --requeue \
    --open-mode=append \
    ${SBATCH_ARGS:-} <<END
#!/usr/bin/env bash
exec python -u $(printf '%q ' "$HERE/predict.py" "${@:3}") --skip-existing --shard "\$SLURM_ARRAY_TASK_ID/\$SLURM_ARRAY_TASK_COUNT"
END
