"""Wheels for a GPU machine: what is required there in turn, what it has, and the size."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu_wheels import Options, collect, collect_all, requirements
from retro_mcore.errors import ConfigurationError

REQUIRED = {
    "first": ["second>=2", "torch", 'third; python_version < "3.12"', 'fourth; extra == "more"'],
    "second": ["First", 'fourth[more]; platform_machine == "x86_64"', "torch<1"],
    "fourth": ['fifth; extra == "more"', 'sixth; extra == "other"'],
}


class Index:
    """Stands for pip: makes a wheel with the requirements above, and some bytes."""

    def __init__(self, size: int = 10) -> None:
        self.asked: list[str] = []
        self.size = size

    def download(self, requirement: str, folder: Path) -> Path:
        self.asked.append(requirement)
        name = requirement.split(">")[0].split("=")[0].split("<")[0]
        folder.mkdir(parents=True, exist_ok=True)
        version = 2 if "<3" in requirement else 3
        path = folder / f"{name}-{version}-py3-none-any.whl"
        lines = [f"Requires-Dist: {each}" for each in REQUIRED.get(name, [])]
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(
                f"{name}-{version}.dist-info/METADATA", "\n".join([f"Name: {name}", *lines, ""])
            )
            wheel.writestr("content", bytes(self.size))
        return path


def test_requirements_are_followed_except_what_is_there(tmp_path):
    index = Index()
    wheels = collect(["first==1"], {"torch"}, Options(tmp_path), index.download)
    assert index.asked == ["first==1", "second>=2", "fourth", "fifth"]
    assert [path.name.split("-")[0] for path in wheels] == ["first", "second", "fourth", "fifth"]


def test_a_wheel_gives_way_to_one_that_fits_all(tmp_path):
    index = Index()
    wheels = collect(
        ["first", "first>1", "first<3"], {"second", "torch"}, Options(tmp_path), index.download
    )
    assert index.asked == ["first", "first<3,>1"]
    assert [path.name for path in wheels] == ["first-2-py3-none-any.whl"]
    assert list(tmp_path.iterdir()) == wheels


def test_the_package_s_own_requirements_are_collected(tmp_path, capsys):
    assert requirements(Options(faiss="faiss-gpu", also=["x"]))[-2:] == ["faiss-gpu", "x"]
    (tmp_path / "list.txt").write_text("PyYAML==6.0\ntorch @ file:///torch.whl\n")
    index = Index()
    options = Options(tmp_path / "wheels", installed=tmp_path / "list.txt")
    collect_all(options, index.download)
    names = {asked.split(">")[0].split("<")[0].split("=")[0] for asked in index.asked}
    assert {"megatron-core", "tyro", "h5py", "sentencepiece", "faiss-cpu"} <= names
    assert not {"pyyaml", "torch", "matplotlib"} & names
    assert index.asked[-1] == "megatron-core==0.15.3"
    assert (tmp_path / "wheels" / "retired" / "megatron-core-3-py3-none-any.whl").is_file()
    assert "--no-index" in capsys.readouterr().out


def test_what_is_left_out_is_said_with_what_is_skipped_for_it(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("torch==2.13\nhf_xet==1.0\nfaiss_gpu==1.14\n")
    options = Options(tmp_path / "wheels", installed=tmp_path / "list.txt", also=[])
    collect_all(options, Index().download)
    printed = capsys.readouterr().out
    assert "Left out: matplotlib.\n" in printed  # hf-xet is there
    assert "has transformer-engine, it skips transformer_engine, fp8, a part of att" in printed
    assert "has transformers, it skips embedding." in printed
    assert "faiss-gpu" not in printed
    collect_all(Options(tmp_path / "others", leave_out=[]), Index().download)
    printed = capsys.readouterr().out
    assert "Left out" not in printed
    assert "has faiss-gpu or faiss-gpu-cuvs, it skips a part of faiss." in printed
    assert "has transformers" not in printed


def test_too_large_a_collection_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"the wheels have .* MiB, the largest"):
        collect_all(Options(tmp_path, limit_mib=0.0001), Index(100).download)
