# retro-mcore for clusters: NVIDIA's PyTorch, CUDA 12, with the versions that pyproject.toml allows.
#
#   docker build -t retro-mcore .
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 -v /data:/data retro-mcore \
#       torchrun --nproc-per-node 8 tools/pretrain_retro.py --project-dir /data/project ...
FROM nvcr.io/nvidia/pytorch:25.06-py3

# TOKENIZERS_PARALLELISM is no secret.
# hadolint ignore=DL3064
ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_INPUT=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1 \
    TOKENIZERS_PARALLELISM=false

WORKDIR /workspace/retro-mcore
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# The image's own torch, Transformer Engine and their kin are built for its CUDA and its drivers:
# they are pinned here as they are, and must come out of the installation unchanged.
COPY setup.py pyproject.toml README.md LICENSE ./
COPY retro_mcore ./retro_mcore
# The versions are those that pyproject.toml allows.
# hadolint ignore=DL3013
RUN built_for_this_image() { \
        pip list --format=freeze \
        | grep -iE '^(torch|torchvision|triton|pytorch[-_]triton|transformer[-_]engine.*|flash[-_]attn)==' ; } \
    && built_for_this_image > /opt/image-versions.txt \
    && PIP_CONSTRAINT=/opt/image-versions.txt pip install ".[gpu,eval]" \
    && built_for_this_image | diff /opt/image-versions.txt - \
    && retro-mcore --help

COPY . .

# The base image's entrypoint stays: it sets up the CUDA compatibility libraries.
CMD ["retro-mcore", "--help"]
