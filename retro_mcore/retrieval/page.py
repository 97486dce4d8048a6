"""Pieces of self-contained HTML pages that show texts and their neighbors; all text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from retro_mcore.retrieval.marked_text import Piece

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --mark: #ffd54a88; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; }
section { border-top: 1px solid var(--line); margin-top: 1.2rem; padding-top: .4rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft);
  padding: .4rem .7rem; border-radius: .3rem; font: 13px/1.5 ui-monospace, monospace; }
.neighbor { margin: .6rem 0 .6rem 2rem; } .about { font-size: .85rem; opacity: .8; }
.continuation { border-top: 1px dashed var(--line); margin-top: .3rem; padding-top: .3rem; }
mark { background: var(--mark); color: inherit; border-radius: .15rem; }
"""


def html_page(title: str, body: str, style: str = "") -> str:
    """A page.

    Args:
        title: Title and first heading, as text.
        body: What follows the heading, as HTML.
        style: CSS in addition to the common style.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def facts_table(facts: Mapping[str, str]) -> str:
    """A table of names and values."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>\n"
        for name, value in facts.items()
    )
    return f"<table>\n{rows}</table>"


def marked_html(pieces: Sequence[Piece], css_class: str = "") -> str:
    """Text whose marked pieces are highlighted.

    Args:
        pieces: The text; pieces with a true mark are highlighted.
        css_class: CSS class of the highlighted pieces.
    """
    start = f'<mark class="{css_class}">' if css_class else "<mark>"
    return "".join(f"{start}{escape(text)}</mark>" if on else escape(text) for text, on in pieces)


def neighbor_html(about: str, parts: Sequence[Sequence[Piece] | None], css_class: str = "") -> str:
    """A neighbor and its continuations.

    Args:
        about: Rank, source, distance and the like, as text.
        parts: The neighbor's own text, then its continuations; None past its document's end.
        css_class: CSS class of the marked pieces.
    """
    first, *rest = parts
    divs = [f"<div>{marked_html(first or [], css_class)}</div>"]
    for following in rest:
        text = "<i>end of its document</i>"
        text = text if following is None else marked_html(following, css_class)
        divs.append(f'<div class="continuation">{text}</div>')
    return (
        f'<div class="neighbor">\n<div class="about">{escape(about)}</div>\n'
        f'<div class="text">{"".join(divs)}</div>\n</div>'
    )
