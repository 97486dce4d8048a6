"""`doctor`: what its checks find, on one process and on ranks that share a store in threads."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from retro_mcore.cli import doctor as command
from retro_mcore.cli.tables.doctor import show_ranks
from retro_mcore.errors import ConfigurationError
from retro_mcore.stages.doctor import (
    Diagnosis,
    DoctorConfig,
    Finding,
    checkup,
    collective,
    host,
    run,
)
from retro_mcore.stages.doctor.device import compare_speeds
from retro_mcore.stages.doctor.peers import Peers, compare_clocks
from retro_mcore.stages.doctor.settings import check_settings, compare_settings, shared_settings
from retro_mcore.stages.doctor.software import check_software
from retro_mcore.stages.doctor.storage import check_storage


def levels(findings) -> dict[str, str]:
    return {finding.subject: finding.level for finding in findings}


def on_ranks(world_size: int, function, seconds: float = 20.0, absent=()) -> dict[int, object]:
    """Call `function(peers)` for each rank, in threads; each rank leads a node of its own."""
    store, results = dist.HashStore(), {}

    def rank_main(rank: int) -> None:
        peers = Peers(store, rank, world_size, seconds)
        peers.local_rank, peers.host = 0, f"node{rank}"
        results[rank] = function(peers)

    ranks = [rank for rank in range(world_size) if rank not in absent]
    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ranks
    return results


def test_this_machine(tmp_path, capsys):
    """The environment of the tests is sound, and the command says so in its exit code and file."""
    flags = [
        "--device",
        "cpu",
        "--project-dir",
        str(tmp_path),
        "--save",
        str(tmp_path / "run"),
    ]
    code = command.main([*flags, "--json", str(tmp_path / "found.json")])
    written = json.loads((tmp_path / "found.json").read_text())
    errors = [found for found in written["findings"] if found["level"] == "error"]
    assert not errors
    assert code == written["exit_code"] < 2
    shown = capsys.readouterr().out
    assert "megatron-core" in shown
    assert "0 errors" in shown
    subjects = {found["subject"] for found in written["findings"]}
    assert {"torch", "h5py", "Faiss", "memory", str(tmp_path)} <= subjects
    assert not (tmp_path / "run").exists()  # a check leaves nothing
    assert not list(tmp_path.glob(".retro_doctor*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "tpu"], "--device: tpu"),
        (["--time-limit", "0"], "--time-limit: 0.0"),
        (["--json", "/dev/null/found.json"], "--json"),
    ],
)
def test_bad_flags_are_refused(flags, message, capsys):
    assert command.main(flags) == 2
    assert message in capsys.readouterr().err


def test_the_exit_code_is_the_most_serious_level():
    fine, slow = Finding("host", "ok", "a", ""), Finding("host", "warning", "b", "", "x")
    wrong = Finding("host", "error", "c", "", "x")
    for findings, code in (([fine], 0), ([fine, slow], 1), ([wrong, slow, fine], 2)):
        assert Diagnosis.of({0: findings}, 1).exit_code == code
    joined = Diagnosis.of({1: [wrong, fine], 0: [fine]}, 2)
    assert joined.findings == [(fine, (0, 1)), (wrong, (1,))]
    assert show_ranks((7, 0, 1, 2)) == "ranks 0-2, 7"


def test_versions_outside_the_range_are_errors(monkeypatch):
    from retro_mcore.stages.doctor import software

    found = {"megatron-core": "0.15.3", "psutil": None}
    real = software.installed
    monkeypatch.setattr(software, "installed", lambda name: found.get(name, real(name)))
    by_name = {finding.subject: finding for finding in check_software(cuda=True)}
    assert by_name["megatron-core"].level == "error"
    assert "0.15.3, not" in by_name["megatron-core"].found
    assert "saving a checkpoint would hang" in by_name["psutil"].found
    assert by_name["transformer-engine"].level == "warning"


@pytest.mark.parametrize("in_a_clone", [False, True])
def test_optional_packages_outside_their_range(monkeypatch, in_a_clone):
    """As extras state them, in metadata or in a clone's pyproject.toml."""
    from retro_mcore.stages.doctor import software

    pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML, so no clone")

    def refuse(name):
        raise PackageNotFoundError(name)

    if in_a_clone:
        monkeypatch.setattr(software, "requires", refuse)
    versions = {"transformer-engine": "1.13.0", "faiss-cpu": None, "faiss-gpu": "1.7.2"}
    real = software.installed
    monkeypatch.setattr(software, "installed", lambda name: versions.get(name, real(name)))
    by_name = {finding.subject: finding for finding in check_software(cuda=True)}
    assert by_name["transformer-engine"].level == "error"
    assert by_name["transformer-engine"].found == "1.13.0, not >=2.1"
    assert by_name["Faiss"].level == "warning"
    assert by_name["Faiss"].found == "faiss-gpu 1.7.2, not >=1.14.3"
    assert by_name["torch"].level == "ok"
    assert "sphinx" not in by_name


def test_settings_that_matter(tmp_path):
    (tmp_path / "eth0").touch()

    def check(tensor_parallel=1, processes=1, capability=(9, 0), **variables):
        return levels(
            check_settings(True, tensor_parallel, processes, capability, variables, tmp_path)
        )

    assert check() == {}
    assert check(NCCL_P2P_DISABLE="1", NCCL_IB_DISABLE="0") == {"NCCL_P2P_DISABLE=1": "warning"}
    assert check(NCCL_SOCKET_IFNAME="ib") == {"NCCL_SOCKET_IFNAME=ib": "error"}
    assert check(NCCL_SOCKET_IFNAME="eth,ib") == {}
    assert check(NCCL_SOCKET_IFNAME="^docker") == {}
    assert check(NCCL_SOCKET_IFNAME="=eth") == {"NCCL_SOCKET_IFNAME==eth": "error"}
    assert check(processes=2) == {"OMP_NUM_THREADS": "warning"}
    many = str(len(os.sched_getaffinity(0)))
    assert check(processes=2, OMP_NUM_THREADS=many) == {f"OMP_NUM_THREADS={many}": "warning"}
    assert check(OMP_NUM_THREADS="all") == {"OMP_NUM_THREADS=all": "error"}
    eight = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    assert check(2, **eight) == {"CUDA_DEVICE_MAX_CONNECTIONS=8": "warning"}
    assert check(2, capability=(10, 0), **eight) == check(1, **eight) == {}
    off = {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0"}
    assert list(check(**off).values()) == ["warning"]
    assert list(check(**off, NVTE_UNFUSED_ATTN="0").values()) == ["error"]


def test_settings_and_speeds_that_differ_between_ranks():
    assert shared_settings({"NCCL_ALGO": "Ring", "HOME": "/"}) == {"NCCL_ALGO": "Ring"}
    (found,) = compare_settings({0: {"NCCL_ALGO": "Ring"}, 1: {"NCCL_ALGO": "Ring"}, 2: {}})
    assert found.found == "differs: Ring on rank 0; unset on rank 2"
    speeds = dict.fromkeys(range(7), 700.0) | {7: 400.0}
    (slow,) = compare_speeds(speeds, {7: "node1"})
    assert slow.subject == "rank 7 on node1"
    assert compare_speeds({0: 700.0, 1: 690.0}, {})[0].level == "ok"


def test_little_memory_and_shared_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "available_memory", lambda: 3 << 30)
    assert levels(host._memory(1)) == {"memory": "warning"}
    usage = shutil._ntuple_diskusage(1, 1, 64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert levels(host._shared_memory(str(tmp_path))) == {str(tmp_path): "warning"}


def test_ranks_that_do_not_come_are_named():
    found = on_ranks(4, lambda peers: peers.meet("start"), seconds=1.0, absent=(1, 3))
    assert found == {0: [1, 3], 2: [1, 3]}
    assert on_ranks(3, lambda peers: peers.meet("start")) == {0: [], 1: [], 2: []}


def test_clocks_that_differ(monkeypatch):
    shift = {1: 0.0, 2: 30.0}
    real = time.time
    ranks: dict[int, int] = {}
    monkeypatch.setattr(time, "time", lambda: real() + ranks.get(threading.get_ident(), 0))

    def compare(peers):
        ranks[threading.get_ident()] = shift.get(peers.rank, 0)
        return compare_clocks(peers, [0, 1, 2])

    (found,) = on_ranks(3, compare)[0]
    assert (found.subject, found.level) == ("rank 2", "warning")
    assert found.found.startswith("30.0 s ahead of rank 0")
    shift.clear()
    assert [each.level for each in on_ranks(3, compare)[0]] == ["ok"]


def test_a_shared_directory(tmp_path):
    found = on_ranks(3, lambda peers: check_storage("--save", tmp_path / "new", peers))
    assert "error" not in [each.level for findings in found.values() for each in findings]
    assert f"checked {tmp_path}" in found[0][0].found
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_directory_is_to_be(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "file/run"):
        found = on_ranks(
            2, lambda peers, name=name: check_storage("--save", tmp_path / name, peers)
        )
        assert [each.level for each in found[0]] == ["error"]
        assert found[0][0].found == f"{tmp_path}/file is not a directory"


@pytest.mark.parametrize(
    "variables",
    [
        {"LOCAL_WORLD_SIZE": "all"},
        {"RANK": "0", "WORLD_SIZE": "two"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": ""},
    ],
)
def test_variables_of_a_launcher_that_are_wrong_are_named(monkeypatch, capsys, variables):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert command.main(["--device", "cpu", "--time-limit", "1"]) == 2
    wrong = [name for name, value in variables.items() if not value.isdecimal()]
    assert wrong[-1] in capsys.readouterr().err.partition("error: ")[2]


def test_a_directory_that_nodes_do_not_share(tmp_path, monkeypatch):
    """Rank 1 looks into another folder of the same name."""
    from retro_mcore.stages.doctor import storage

    told = Peers.get

    def elsewhere(peers, name, rank, wait=True):
        value = told(peers, name, rank, wait)
        return f"{value}_elsewhere" if peers.rank == 1 and name.startswith("probe") else value

    monkeypatch.setattr(Peers, "get", elsewhere)
    found = on_ranks(2, lambda peers: storage.check_storage("--save", tmp_path, peers), seconds=1.0)
    (wrong,) = [each for each in found[1] if each.level == "error"]
    assert "node1 does not see the files of rank 0" in wrong.found


def test_a_file_system_without_locks_or_renames(tmp_path, monkeypatch):
    from retro_mcore.stages.doctor import storage

    def refuse(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(storage.fcntl, "flock", refuse)
    monkeypatch.setattr(Path, "replace", refuse)
    found = levels(check_storage("--save", tmp_path, Peers(dist.HashStore(), 0, 1, 1.0)))
    assert found["--save, locks (flock)"] == found["--save, atomic renames"] == "error"


def test_a_hanging_collective_names_who_is_behind():
    assert collective.ends_in_time(lambda: None, 5.0)
    event = threading.Event()
    assert not collective.ends_in_time(event.wait, 0.1)
    event.set()

    def stuck(peers):
        peers.put("collective", 0 if peers.rank == 1 else 1)
        peers.meet("put")
        return collective._stuck(peers)

    found = on_ranks(3, stuck)[0]
    assert "ranks 1 did not get beyond 'joining the group'" in found.found


def test_a_report_reaches_all_ranks(monkeypatch):
    """All ranks end with the exit code of the worst finding, also where one reports nothing."""
    wrong = Finding("host", "error", "disk", "is full", "Empty it")

    def report(peers):
        return checkup._report(peers, [wrong] if peers.rank == 2 else [], [], False)

    found = on_ranks(3, report)
    assert [outcome.exit_code for outcome in found.values()] == [2, 2, 2]
    assert found[0].diagnosis.findings == [(wrong, (2,))]
    assert found[1].diagnosis is None


def test_cuda_is_asked_for_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = run(DoctorConfig(device="cuda"))
    assert outcome.exit_code == 2
    assert any(
        finding.area == "device" and finding.level == "error"
        for finding, _ in outcome.diagnosis.findings
    )
    with pytest.raises(ConfigurationError, match="--tensor-model-parallel-size"):
        run(DoctorConfig(tensor_model_parallel_size=0))


def gpu(monkeypatch, **functions):
    """Let torch find one GPU whose functions answer, or raise, what is given."""
    found = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "get_device_capability": lambda: (9, 0),
        "get_device_name": lambda: "H100",
        "is_bf16_supported": lambda including_emulation: True,
        "mem_get_info": lambda: (79 << 30, 80 << 30),
    }
    for name, function in {**found, **functions}.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.cuda, "nccl", SimpleNamespace(version=lambda: (2, 30, 7)))


def broken(*args):
    raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")


@pytest.mark.parametrize("name", ["set_device", "get_device_capability", "mem_get_info", "product"])
def test_a_gpu_that_does_not_work_is_reported(monkeypatch, name):
    from retro_mcore.stages.doctor import device

    monkeypatch.setattr(device, "matmul_tflops", broken if name == "product" else lambda: 700.0)
    gpu(monkeypatch, **({} if name == "product" else {name: broken}))
    outcome = run(DoctorConfig(device="cuda"))
    found = [each for each, _ in outcome.diagnosis.findings if each.subject == "GPU 0"]
    assert [each.level for each in found] == ["error"]
    assert found[0].found == "CUDA error: out of memory Compile with TORCH_USE_CUDA_DSA"


def test_a_gpu_that_works(monkeypatch):
    from retro_mcore.stages.doctor import device

    monkeypatch.setattr(device, "matmul_tflops", lambda: 700.0)
    gpu(monkeypatch, mem_get_info=lambda: (60 << 30, 80 << 30))
    found = {each.subject: each for each, _ in run(DoctorConfig()).diagnosis.findings}
    assert found["GPU"].found == f"H100, compute capability 9.0, CUDA {torch.version.cuda}"
    assert found["NCCL"].found == "2.30.7"
    assert (found["GPU 0"].level, found["GPU 0"].found) == ("warning", "20.0 of 80 GiB are in use")
    assert found["matrix products"].found == "700 TFLOP/s in bf16 (median)"


def test_a_check_for_the_cpu_does_not_touch_gpus(monkeypatch):
    gpu(monkeypatch, get_device_capability=broken, set_device=broken, mem_get_info=broken)
    levels_found = {each.level for each, _ in run(DoctorConfig(device="cpu")).diagnosis.findings}
    assert "error" not in levels_found
