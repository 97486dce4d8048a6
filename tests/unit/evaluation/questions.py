"""A test file in upstream's format, on the text of the small project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.unit.data.projects import documents


def records(count: int = 7) -> list[dict[str, Any]]:
    """Questions with passages; the last one is a choice."""
    texts = documents()
    listed: list[dict[str, Any]] = [
        {
            "question": f"What is said about {text.split()[0]}?",
            "answers": [" ".join(text.split()[1:4]), "nothing"],
            "ctxs": [
                {"title": "", "text": other[:80]} for other in (text, *texts[number + 1 :][:3])
            ],
        }
        for number, text in enumerate(texts[: count - 1])
    ]
    choice = {
        "question": "Which is a letter?",
        "qa_type": "multi_choice_qa",
        "multichoice_options": ["x", "12"],
        "answers": ["x"],
        "ctxs": [{"title": "t", "text": "x is one"}],
    }
    return [*listed, choice]


def write_test_file(folder: Path, count: int = 7) -> Path:
    """`nq/test.json` in a folder."""
    path = folder / "nq" / "test.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records(count)), encoding="utf-8")
    return path
