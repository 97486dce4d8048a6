"""docs/architecture.md names what exists, and every room of the package."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_every_path_that_the_page_names_exists():
    named = set(re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.py)?)`", PAGE))
    assert len(named) > 15
    missing = [path for path in named if not any((base / path).exists() for base in _bases())]
    assert not missing


def test_every_room_has_a_line_in_the_map():
    code_map = PAGE.split("```")[1]
    rooms = {f"{path.parent.name}/" for path in (ROOT / "retro_mcore").glob("*/__init__.py")}
    rooms -= {"conversion/"}  # a former home, for code written for 0.1
    assert {room for room in rooms if f"  {room}" not in code_map} == set()


def _bases() -> tuple[Path, ...]:
    return ROOT, ROOT / "retro_mcore"
