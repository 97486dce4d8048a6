"""Marks of copied text, as `generate` prints them."""

import pytest

from retro_mcore.cli.tables.continuation import _marked, _marks


def test_copied_text_is_marked_and_the_rest_shortened():
    pieces = [("a " * 100, False), ("the\n river", True), (" end", False)]
    line = _marked(pieces, ("[[", "]]"))
    assert line == f"{'a ' * 40}… {'a ' * 40}[[the river]] end"


@pytest.mark.parametrize(
    ("terminal", "environment", "marks"),
    [
        (True, {}, ("\x1b[1;4m", "\x1b[0m")),
        (False, {}, ("[[", "]]")),
        (True, {"NO_COLOR": ""}, ("[[", "]]")),
        (True, {"TERM": "dumb"}, ("[[", "]]")),
    ],
)
def test_a_terminal_is_underlined_unless_it_is_plain(monkeypatch, terminal, environment, marks):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    assert _marks() == marks
