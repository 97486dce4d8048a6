"""`doctor`: what nvidia-smi and InfiniBand's folder tell, in texts as drivers write them."""

from __future__ import annotations

import pytest

from retro_mcore.stages.doctor import hardware
from retro_mcore.stages.doctor.hardware import (
    check_hardware,
    check_ports,
    gpu_paths,
    inactive_links,
    judge_gpus,
    judge_links,
)

_LEGEND = """
Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect
  NV#  = Connection traversing a bonded set of # NVLinks
"""
#: As driver 550 and later: underlined names, columns of adapters and of the GPU's own memory.
SWITCHED = (
    """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tNV18\tPIX\t0-55,112-167\t0\t\tN/A
GPU1\tNV18\t X \tNV18\tNODE\t0-55,112-167\t0\t\tN/A
GPU2\tNV18\tNV18\t X \tNODE\t56-111,168-223\t1\t\tN/A
NIC0\tPIX\tNODE\tNODE\t X \t\t\t\t
"""
    + _LEGEND
)
#: As driver 470: a bridge between two of three.
BRIDGED = (
    """\
\tGPU0\tGPU1\tGPU2\tCPU Affinity\tNUMA Affinity
GPU0\t X \tNV4\tNODE\t0-31,64-95\t0
GPU1\tNV4\t X \tNODE\t0-31,64-95\t0
GPU2\tNODE\tNODE\t X \t0-31,64-95\t0
"""
    + _LEGEND
)
ALONE = "\tGPU0\tCPU Affinity\tNUMA Affinity\nGPU0\t X \t0-15\t\tN/A\n" + _LEGEND
WITHOUT = BRIDGED.replace("NV4", "PHB")
#: Links of one kind or another that are down.
DOWN = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-00000000-0000-0000-0000-000000000000)
\t Link 0: 26.562 GB/s
\t Link 1: <inactive>
\t Link 2: 0.000 GB/s
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-00000000-0000-0000-0000-000000000001)
NVML: Unable to retrieve NVLink information as all links are inActive
GPU 2: NVIDIA H100 80GB HBM3 (UUID: GPU-00000000-0000-0000-0000-000000000002)
\t Link 0: 25 GB/s
\t Link 10: 25.781 GB/s
"""


def test_paths_between_gpus():
    assert gpu_paths(SWITCHED) == {
        0: {0: "X", 1: "NV18", 2: "NV18"},
        1: {0: "NV18", 1: "X", 2: "NV18"},
        2: {0: "NV18", 1: "NV18", 2: "X"},
    }
    assert gpu_paths(BRIDGED)[2] == {0: "NODE", 1: "NODE", 2: "X"}
    assert gpu_paths(ALONE) == {0: {0: "X"}}
    assert gpu_paths("No devices were found\n") == {}


def test_links_that_are_down():
    assert inactive_links(DOWN) == {0: "link 1, 2", 1: "all"}
    assert inactive_links("GPU 0: NVIDIA A100 (UUID: GPU-0)\n\t Link 0: 25 GB/s\n") == {}
    assert inactive_links("") == {}


@pytest.mark.parametrize(
    ("topology", "status", "told"),
    [
        (SWITCHED, "", [("ok", "3 GPUs: NV18")]),
        (BRIDGED, "", [("note", "3 GPUs: NODE, NV4; fewer NVLinks or none between 0-2 NODE, 1-2")]),
        (WITHOUT, "", [("note", "3 GPUs: NODE, PHB; no NVLink")]),
        (ALONE, "", []),
        (ALONE, "GPU 0: x\nNVML: Unable to retrieve: all links are inActive", []),
        (SWITCHED, DOWN, [("warning", "links are down (GPU 0: link 1, 2; GPU"), ("ok", "3")]),
        (None, None, [("note", "nvidia-smi topo -m tells none: not checked")]),
        ("garbage", "garbage", [("note", "nvidia-smi topo -m tells none: not checked")]),
    ],
)  # fmt: skip
def test_links_are_judged(topology, status, told):
    found = list(judge_links(topology, status))
    assert [each.level for each in found] == [level for level, _ in told]
    for each, (_, text) in zip(found, told, strict=True):
        assert each.found.startswith(text)


#: What healthy GPUs tell: one with ECC and row remapping, one without either.
HEALTHY = {
    "index": ["0", "1"],
    "persistence_mode": ["Enabled", "Enabled"],
    "ecc.errors.uncorrected.volatile.total": ["0", "[N/A]"],
    "retired_pages.pending": ["No", "[Not Supported]"],
    "remapped_rows.pending": ["0", "[N/A]"],
    "remapped_rows.failure": ["0", "[Insufficient Permissions]"],
    "clocks_event_reasons.active": ["0x0000000000000001", "0x0000000000000004"],
}


def test_healthy_gpus():
    assert list(judge_gpus(HEALTHY)) == []


@pytest.mark.parametrize(
    ("field", "value", "level", "told"),
    [
        ("ecc.errors.uncorrected.volatile.total", "2", "warning", "uncorrected memory"),
        ("ecc.errors.uncorrected.volatile.total", "[Unknown Error]", "warning", "uncorrected"),
        ("retired_pages.pending", "Yes", "warning", "memory pages to be retired: Yes"),
        ("remapped_rows.pending", "1", "warning", "memory rows to be remapped: 1"),
        ("remapped_rows.failure", "Yes", "warning", "memory rows that could not be remapped: Yes"),
        ("clocks_event_reasons.active", "0x0000000000000028", "warning",
         "clocks are lowered: a slowdown by the hardware, heat, by the driver"),
        ("clocks_event_reasons.active", "0x00000000000000C0", "warning",
         "clocks are lowered: heat, by the hardware, the power supply"),
        ("persistence_mode", "Disabled", "note", "off for GPU 1"),
    ],
)  # fmt: skip
def test_sick_gpus(field, value, level, told):
    (found,) = judge_gpus({**HEALTHY, field: [HEALTHY[field][0], value]})
    assert (found.level, found.found[: len(told)]) == (level, told)
    assert found.subject in ("GPU 1", "persistence mode")
    assert (found.fix != "") == (level == "warning")


def test_a_field_that_the_driver_does_not_know_is_not_checked(tmp_path, monkeypatch):
    """It fails a whole query, so each is asked for by itself; texts are of a program here."""
    script = """#!/bin/sh
case "$1" in
--query-gpu=index) echo 0 ;;
--query-gpu=persistence_mode) echo Enabled ;;
--query-gpu=ecc.*) echo 3 ;;
--query-remapped-rows=remapped_rows.pending) echo 1 ;;
--query-gpu=clocks_throttle_reasons.active) echo 0x0000000000000040 ;;
--query-*) echo "Field is not a valid field to query."; exit 2 ;;
topo) printf '\\tGPU0\\tCPU Affinity\\nGPU0\\t X \\t0-15\\n' ;;
*) exit 9 ;;
esac
"""
    program = tmp_path / "nvidia-smi"
    program.write_text(script.replace("\\\\", "\\"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    told = [(each.level, each.found) for each in check_hardware(cuda=True)]
    assert told == [
        ("warning", "uncorrected memory errors (ECC): 3"),
        ("warning", "memory rows to be remapped: 1"),
        ("warning", "clocks are lowered: heat, by the hardware"),
        ("note", "does not tell retired_pages.pending, remapped_rows.failure: not checked"),
    ]


def test_without_nvidia_smi(monkeypatch):
    assert check_hardware(cuda=False) == []
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    (found,) = check_hardware(cuda=True)
    assert (found.level, found.found[:15]) == ("note", "is not there: G")


def test_ports(tmp_path):
    def port(name: str, state: str) -> None:
        folder = tmp_path / name / "ports" / "1"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state").write_text(f"{state}\n")

    assert list(check_ports(tmp_path / "nowhere")) == []
    port("mlx5_0", "4: ACTIVE")
    assert [each.level for each in check_ports(tmp_path)] == ["ok"]
    port("mlx5_1", "1: DOWN")
    (found,) = check_ports(tmp_path)
    assert found.level == "note"
    assert found.found.startswith("1 ports are active; not so mlx5_1/1 DOWN. ")
    port("mlx5_0", "2: INIT")
    (found,) = check_ports(tmp_path)
    assert found.level == "warning"
    assert found.found == "no port is active: mlx5_0/1 INIT, mlx5_1/1 DOWN"
