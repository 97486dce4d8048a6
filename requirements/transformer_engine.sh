#!/bin/sh
# Installs Transformer Engine into a folder of its own, on a machine without a GPU (`make test-te`).
#
#   requirements/transformer_engine.sh PYTHON VERSION OLDEST FOLDER
#
# There is no wheel of its PyTorch extension, so it is built from its source distribution: an hour on two busy cores,
# once. The wheel stays in FOLDER/wheels. It needs CUDA's compiler (CUDA_HOME); the libraries come from wheels.
# FOLDER/oldest gets the sources of release OLDEST, to be read, not imported. JOBS: compilers at a time.
set -eu
python=$1 version=$2 oldest=$3 folder=$4
here=$(dirname "$0")
pip="$python -m pip --disable-pip-version-check"

mkdir -p "$folder/wheels"
# What the environment has already keeps its version, but for PyTorch.
grep -vE '^(#|torch==|setuptools==)' "$here/cpu.txt" > "$folder/constraints.txt"
# All at once: with --target, pip replaces a folder of the same name, and two of these share theirs.
$pip install --quiet --no-compile --upgrade --target "$folder" -c "$folder/constraints.txt" \
    -r "$here/transformer_engine.txt" "transformer-engine[core-cu13]==$version"
$pip install --quiet --no-compile --upgrade --target "$folder/oldest" --no-deps "transformer-engine==$oldest"

if ! ls "$folder/wheels/transformer_engine_torch-$version-"*.whl > /dev/null 2>&1; then
    for cuda in "${CUDA_HOME:-}" /usr/local/cuda /usr/local/cuda-13*; do
        [ -x "$cuda/bin/nvcc" ] && export CUDA_HOME="$cuda" && break
    done
    if [ ! -x "${CUDA_HOME:-}/bin/nvcc" ]; then
        echo "No nvcc in CUDA_HOME (${CUDA_HOME:-not set}) nor /usr/local/cuda*: install CUDA 13's compiler" >&2
        exit 1
    fi
    headers=$(echo "$folder"/nvidia/*/include | tr ' ' ':')
    libraries=$(echo "$folder"/nvidia/*/lib | tr ' ' ':')
    export CPATH="$headers" LIBRARY_PATH="$libraries" PATH="$folder/bin:$CUDA_HOME/bin:$PATH"
    export PYTHONPATH="$folder" NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS="${JOBS:-2}"
    $pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder/wheels" "transformer-engine-torch==$version"
fi
# Not by pip: it would replace the folder transformer_engine, where the wheel adds one file.
$python -m zipfile -e "$folder/wheels/transformer_engine_torch-$version-"*.whl "$folder"
