"""The sections of the report, in the order they run: those that the CPU slows down come last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: Variables under which CUDA's libraries repeat their results; --deterministic-mode asks for them.
DETERMINISTIC = {
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


@dataclass(frozen=True)
class Section:
    """A section.

    Attributes:
        name: Its name on the command line.
        title: Its heading in the report.
        target: `module:function`; the function takes a `Setting` and a `Findings`.
        environment: Variables of its process. Sections with the same ones share a process.
        correctness: Whether it checks results, not only speed.
    """

    name: str
    title: str
    target: str
    environment: Mapping[str, str] = field(default_factory=dict)
    correctness: bool = True


@dataclass(frozen=True)
class Need:
    """Packages beyond this package's requirements, and what is skipped without them.

    Attributes:
        packages: Names; one of them is enough.
        sections: Sections that are skipped.
        parts: Sections of which a part is skipped.
    """

    packages: tuple[str, ...]
    sections: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()


NEEDS = (
    Need(
        ("transformer-engine",),
        ("transformer_engine", "fp8"),
        ("attention", "bf16_training", "utilization"),
    ),
    Need(("faiss-gpu", "faiss-gpu-cuvs"), parts=("faiss",)),
    Need(("transformers",), ("embedding",)),
)


def _section(name: str, title: str, module: str, function: str = "", **fields: object) -> Section:
    target = f"benchmarks.gpu_report.{module}:{function or name}"
    return Section(name, title, target, **fields)  # type: ignore[arg-type]


SECTIONS = {
    section.name: section
    for section in (
        _section("precision", "bf16 against fp32: logits and gradients", "numerics"),
        _section(
            "transformer_engine",
            "Transformer Engine against local layers: logits and gradients",
            "numerics",
        ),
        _section("attention", "Attention kernels that run", "kernels"),
        _section("bf16_training", "Training in bf16 against fp32: losses", "training"),
        _section("fp8", "Training in fp8 against bf16: losses", "training"),
        _section(
            "resume",
            "Resumed training in bf16, bit for bit",
            "training",
            environment=DETERMINISTIC,
        ),
        _section("parallel", "Parallel layouts against one process: losses", "parallel"),
        _section("faiss", "Faiss: building and searching", "retrieval"),
        _section("step_time", "Step against the retired model", "speed", correctness=False),
        _section("utilization", "Model FLOPs utilization", "speed", correctness=False),
        _section("decoding", "Cached decoding", "speed", correctness=False),
        _section("embedding", "Embedding rate", "retrieval", correctness=False),
        _section("queries", "Chunks queried per second", "retrieval", correctness=False),
    )
}
