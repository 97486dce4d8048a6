"""The stages as docs/data_formats.md calls them from Python."""

from __future__ import annotations

import re
from pathlib import Path

from retro_mcore.project.config import ProjectConfig

PAGE = Path(__file__).parents[3] / "docs" / "data_formats.md"


def test_the_documented_example(tmp_path, monkeypatch, capsys):
    """Its own lines are all that is printed on stdout."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.M)
    names: dict = {}
    exec(compile(code, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == code.count("print(")
    assert printed[0].startswith("20 documents, ")
    update, database = names["update"], names["database"]
    assert update.num_chunks > update.num_before == database.num_train_chunks
    assert update.database.num_train_chunks == update.num_chunks
    config = ProjectConfig.load(Path("project"))
    assert config.database_paths(Path("project").absolute()).root == update.project
    # Of the merged databases: the held-out one holds the documents of both held-out splits.
    assert set(names["neighbors"].num_chunks) == {"train", "valid"}
