#!/bin/bash
# Submits all stages of the data pipeline, each after the one before has succeeded:
#
#     bash examples/slurm/pipeline.sh /data/wiki /data/wiki.jsonl
#
# Edit the flags below. EMBED_JOBS sets the number of jobs that embed and add (8). If a stage fails,
# Slurm leaves the later ones pending (DependencyNeverSatisfied): cancel them, and run this again.
# Finished stages then end at once.
set -euo pipefail
project=${1:?usage: pipeline.sh PROJECT INPUT}
input=${2:?usage: pipeline.sh PROJECT INPUT}
jobs=${EMBED_JOBS:-8}
last=''

# Submit a stage after the last one: SBATCH_FLAGS -- STAGE FLAGS.
submit() {
    local flags=() after=()
    while [[ $1 != -- ]]; do
        flags+=("$1")
        shift
    done
    shift
    if [[ -n $last ]]; then after=(--dependency "afterok:$last"); fi
    last=$(sbatch --parsable "${after[@]}" "${flags[@]}" examples/slurm/data.sbatch "$1" --project-dir "$project" "${@:2}")
    last=${last%%;*}
    echo "$last: $*"
}

submit --cpus-per-task 32 -- preprocess_corpus --input "$input" --vocab-size 32000 --seq-length 2048 \
    --retro-chunk-length 64 --split 98,2,0 --global-batch-size 512 --train-samples 192000000
submit --cpus-per-task 32 -- build_db
submit --array "1-$jobs" --gpus-per-node 1 -- build_index --stage embed
submit --gpus-per-node 1 -- build_index --stage train
submit --array "1-$jobs" --gpus-per-node 1 -- build_index --stage add
submit --cpus-per-task 1 -- build_index --stage merge
submit --gpus-per-node 8 -- query_neighbors
