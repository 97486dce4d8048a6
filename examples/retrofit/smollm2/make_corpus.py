"""The reference pages of Amazon's web services, from the PyPI package botocore, as JSON lines.

One document per operation: what it does, its parameters and its results. Texts are Apache-2.0.
Pages of one service describe the same things in similar words, as a company's documentation does.
Lists of errors, which all pages of a service repeat word for word, are left out. So is a page with
the text of another one.
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BREAK = re.compile(r"</?(?:p|div|ul|ol|dl|dd|note|important|caution|h\d|br|pre|tr|table)\b[^>]*>")
_ITEM = re.compile(r"<(?:li|dt)\b[^>]*>")
_TAG = re.compile(r"</?[A-Za-z][^>]*>")


def plain_text(markup: str) -> str:
    """Documentation without its HTML; items of lists begin with a dash.

    >>> plain_text("<p>See <code>Name</code>.</p><ul><li><p>one</p></li></ul>")
    'See Name.\\n- one'
    """
    text = _ITEM.sub("\n- ", _BREAK.sub("\n", " ".join(markup.split())))
    text = html.unescape(_TAG.sub("", text))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line).replace("\n-\n", "\n- ")


def documents(data: Path, num_services: int, seed: int) -> Iterator[dict[str, str]]:
    """The pages of some services, in random order.

    Args:
        data: botocore's data folder.
        num_services: Number of services to draw.
        seed: Seed of the draw and of the order.
    """
    names = sorted(path.name for path in data.iterdir() if path.is_dir())
    drawn = random.Random(seed).sample(names, min(num_services, len(names)))
    pages = [page for name in sorted(drawn) for page in _pages(data / name)]
    random.Random(seed).shuffle(pages)
    seen: set[str] = set()
    for page in pages:
        if page["text"] not in seen:
            seen.add(page["text"])
            yield page


def _pages(service: Path) -> Iterator[dict[str, str]]:
    files = sorted(service.glob("*/service-2.json.gz"))
    if not files:
        return
    model = json.loads(gzip.decompress(files[-1].read_bytes()))  # the newest version
    title = model["metadata"].get("serviceFullName", service.name)
    for name, operation in sorted(model["operations"].items()):
        text = "\n\n".join(_sections(title, name, operation, model["shapes"]))
        yield {"id": f"{service.name}/{name}", "text": text}


def _sections(title: str, name: str, operation: dict[str, Any], shapes: Any) -> Iterator[str]:
    yield f"{name} - {title}"
    if described := plain_text(operation.get("documentation", "")):
        yield described
    for heading, key in (("Parameters", "input"), ("Returns", "output")):
        if members := list(_members(operation.get(key), shapes)):
            yield "\n\n".join([f"{heading}:", *members])


def _members(reference: Any, shapes: Any) -> Iterator[str]:
    if reference is None:
        return
    shape = shapes[reference["shape"]]
    required = set(shape.get("required", ()))
    for name, member in shape.get("members", {}).items():
        target = shapes[member["shape"]]
        kind = target["type"] + (", required" if name in required else "")
        text = plain_text(member.get("documentation") or target.get("documentation", ""))
        yield f"{name} ({kind}): {text}" if text else f"{name} ({kind})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="botocore's data folder")
    parser.add_argument("--output", type=Path, required=True, help="the JSONL file to write")
    parser.add_argument("--services", type=int, default=24, help="number of services")
    parser.add_argument("--max-documents", type=int, help="write at most this many")
    parser.add_argument("--seed", type=int, default=1, help="seed of the drawn services")
    options = parser.parse_args()
    pages = list(documents(options.data, options.services, options.seed))[: options.max_documents]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.output.with_suffix(".partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(page, ensure_ascii=False) + "\n" for page in pages)
    temporary.rename(options.output)
    characters = sum(len(page["text"]) for page in pages)
    print(f"{len(pages)} pages, {characters:,} characters in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
