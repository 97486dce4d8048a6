"""Run all checks, on all ranks together, and collect what they find on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from retro_mcore.errors import ConfigurationError, RetroError
from retro_mcore.platform import setup_device
from retro_mcore.project.verification import compare_sizes
from retro_mcore.stages.doctor.collective import check_collective
from retro_mcore.stages.doctor.device import check_device, compare_speeds, measure_speed
from retro_mcore.stages.doctor.findings import Diagnosis, Finding, error, note, ok
from retro_mcore.stages.doctor.hardware import check_hardware, check_ports
from retro_mcore.stages.doctor.host import check_host
from retro_mcore.stages.doctor.peers import Peers, compare_clocks, join, missing
from retro_mcore.stages.doctor.settings import check_settings, compare_settings, shared_settings
from retro_mcore.stages.doctor.software import check_software, installed
from retro_mcore.stages.doctor.storage import check_storage

#: Packages whose versions must be the same on all ranks.
_SAME = ("retro-mcore", "torch", "megatron-core", "transformer-engine", "numpy")


@dataclass
class DoctorConfig:
    """Configuration of `doctor`."""

    project_dir: str | None = None
    """Project directory. Its file system is checked, and the sizes of its files."""
    save: str | None = None
    """Directory for checkpoints. Its file system is checked."""
    device: str = "auto"
    """Device of the run: auto, cpu or cuda."""
    tensor_model_parallel_size: int = 1
    """Number of processes over which each layer will be split."""
    time_limit: float = 300.0
    """Seconds to wait for other ranks at each step, before they are reported as missing."""


@dataclass(frozen=True)
class Outcome:
    """The result of `run` on this rank.

    Attributes:
        diagnosis: The findings of all ranks; None on ranks that report to another one.
        hangs: Whether this process hangs in a collective, and must be ended.
        exit_code: 0: nothing to fix; 1: warnings; 2: errors. The same on all ranks.
    """

    diagnosis: Diagnosis | None
    hangs: bool
    exit_code: int


def run(config: DoctorConfig, report: Callable[[Diagnosis], None] | None = None) -> Outcome:
    """Check this node; under torchrun, all ranks.

    Args:
        config: The configuration.
        report: Called with the diagnosis on the rank that has it, before any rank leaves: torchrun
            ends the others when one leaves with an exit code.

    Raises:
        ConfigurationError: a flag's value is invalid, or rank 0 cannot be reached.
    """
    _check_flags(config)
    peers = join(config.time_limit)
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    findings = check_device(cuda, peers.local_world_size)
    speed = None
    if cuda and _is_usable(findings):
        speed, failures = measure_speed()
        findings += failures
    usable = _is_usable(findings)
    # Of a GPU that is used: asking makes a context, beside which a run on the CPU is refused.
    capability = torch.cuda.get_device_capability() if cuda and usable else None
    findings += _each_node(config, peers, cuda, capability)
    facts = {"host": peers.host, "leads": peers.leads, "usable": usable, "tflops": speed}
    peers.put("facts", {**facts, "settings": shared_settings(), "versions": _versions()})
    absent = peers.meet("the start")
    hangs = False
    if absent:
        known = peers.gather("facts", [r for r in range(peers.world_size) if r not in absent])
        hosts = {rank: fact["host"] for rank, fact in known.items()}
        findings += [missing("the start", absent, hosts)] if peers.rank == min(known) else []
    else:
        more, hangs = _together(config, peers, cuda)
        findings += more
    return _report(peers, findings, absent, hangs, report)


def _check_flags(config: DoctorConfig) -> None:
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigurationError("--device", config.device, "Choose auto, cpu or cuda")
    for name in ("time_limit", "tensor_model_parallel_size"):
        if not getattr(config, name) > 0:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigurationError(flag, f"{getattr(config, name)}", "Give a positive number")


def _is_usable(findings: Sequence[Finding]) -> bool:
    return not any(each.area == "device" and each.level == "error" for each in findings)


def _each_node(
    config: DoctorConfig, peers: Peers, cuda: bool, capability: tuple[int, int] | None
) -> list[Finding]:
    """Checks that the first rank of each node makes for all of its ranks."""
    if not peers.leads:
        return []
    local = peers.local_world_size
    return [
        *check_software(cuda),
        *check_host(local),
        *check_hardware(cuda),
        *check_ports(),
        *check_settings(cuda, config.tensor_model_parallel_size, local, capability),
    ]


def _versions() -> dict[str, str]:
    return {name: installed(name) or "none" for name in _SAME}


def _together(config: DoctorConfig, peers: Peers, cuda: bool) -> tuple[list[Finding], bool]:
    """Checks that all ranks make together, and whether this rank hangs in one."""
    facts = peers.gather("facts")
    findings: list[Finding] = []
    if peers.rank == 0:
        findings += _compare(facts)
        findings += _project(config.project_dir)
    leaders = [rank for rank, fact in facts.items() if fact["leads"]]
    findings += compare_clocks(peers, leaders)
    for flag, directory in (("--project-dir", config.project_dir), ("--save", config.save)):
        if directory is not None:
            findings += check_storage(flag, Path(directory), peers)
    if peers.world_size == 1 or not all(fact["usable"] for fact in facts.values()):
        return findings, False
    device = setup_device("cuda" if cuda else "cpu")
    more, hangs = check_collective(peers, device)
    return [*findings, *more], hangs


def _compare(facts: dict[int, Any]) -> list[Finding]:
    hosts = {rank: fact["host"] for rank, fact in facts.items()}
    speeds = {rank: fact["tflops"] for rank, fact in facts.items() if fact["tflops"]}
    findings = compare_settings({rank: fact["settings"] for rank, fact in facts.items()})
    findings += compare_speeds(speeds, hosts)
    for name in _SAME:
        versions = {rank: fact["versions"][name] for rank, fact in facts.items()}
        if len(set(versions.values())) > 1:
            told = ", ".join(f"{value} on rank {rank}" for rank, value in sorted(versions.items()))
            fix = "Install the same version on all nodes"
            findings.append(error("software", name, f"differs: {told[:300]}", fix))
    return findings


def _project(directory: str | None) -> list[Finding]:
    """Compare the sizes of a project's files with their markers."""
    if directory is None:
        return []
    if not (Path(directory) / "config.json").is_file():
        return [note("project", directory, "is no project yet (preprocess_corpus makes one)")]
    try:
        count = compare_sizes(directory)
    except RetroError as problems:
        return [error("project", each.subject, each.found, each.hint) for each in problems.problems]
    return [ok("project", directory, f"{count} files have their sizes; `verify` reads them")]


def _report(
    peers: Peers,
    findings: Sequence[Finding],
    absent: Sequence[int],
    hangs: bool,
    report: Callable[[Diagnosis], None] | None = None,
) -> Outcome:
    """Collect the findings on the first rank that is there; all ranks get its exit code."""
    present = [rank for rank in range(peers.world_size) if rank not in absent]
    reporter = present[0]
    peers.put("findings", [astuple(each) for each in findings])
    if peers.rank != reporter:
        code = peers.get("exit code", reporter)
        peers.put("leaves", True)
        return Outcome(None, hangs, 2 if code is None else code)
    by_rank = {
        rank: [Finding(*values) for values in found]
        for rank, found in peers.gather("findings", present).items()
    }
    silent = [rank for rank in present if rank not in by_rank]
    if silent:
        by_rank[reporter].append(missing("the report", silent, {}))
    diagnosis = Diagnosis.of(by_rank, peers.world_size)
    if report is not None:
        report(diagnosis)
    peers.put("exit code", diagnosis.exit_code)
    peers.gather("leaves", [rank for rank in by_rank if rank != reporter])  # they read from here
    return Outcome(diagnosis, hangs, diagnosis.exit_code)
