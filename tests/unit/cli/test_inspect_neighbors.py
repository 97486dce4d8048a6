"""The page of neighbors, read as a browser (where there is one) or an HTML parser reads it."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.cli import inspect_neighbors as command
from retro_mcore.cli.inspect_neighbors import InspectNeighborsOptions, inspect_neighbors
from retro_mcore.data.tokenizers.loading import GPTSentencePieceTokenizer, load_project_tokenizer
from retro_mcore.project import ProjectConfig, ProjectPaths
from retro_mcore.retrieval.marked_text import split_text
from retro_mcore.retrieval.neighbor_page import (
    ChunkView,
    Histogram,
    NeighborView,
    Page,
    SampleView,
    render,
)
from retro_mcore.retrieval.neighbor_tables import SavedDistances
from retro_mcore.samples.retro_dataset import build_retro_datasets
from tests.integration.browser import NAMES as BROWSERS
from tests.unit.data.projects import built_project

CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
VOID = {"meta", "line", "rect"}


class Reader(HTMLParser):
    """Text by tag or .class of the elements that hold it; refuses tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: dict[str, list[str]] = {}
        self.attributes: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.attributes += [str(value) for value in values.values()]
        names = [tag, *(f".{name}" for name in (values.get("class") or "").split())]
        for name in names:
            self.found.setdefault(name, []).append("")
        if tag not in VOID:
            self.open.append(" ".join(names))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop().split()[0] == tag

    def handle_data(self, data):
        for name in {name for names in self.open for name in names.split()}:
            self.found[name][-1] += data


def load(path: Path) -> Reader:
    """The page after a browser has built it, or as it is."""
    text = path.read_text(encoding="utf-8")
    if CHROMIUM is not None:
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        shown = subprocess.run(
            [CHROMIUM, *arguments, path.as_uri()], capture_output=True, text=True, check=True
        )
        text = shown.stdout
    assert text.lower().startswith("<!doctype html>")
    return Reader(text)


@pytest.fixture(scope="module")
def project():
    return built_project()


def test_the_page_shows_what_the_dataset_gives(project, tmp_path):
    options = InspectNeighborsOptions(str(project), str(tmp_path / "page.html"), samples=[5, 2])
    result = inspect_neighbors(options)
    page = load(result.output)
    assert page.found["h2"] == ["Sample 5", "Sample 2"]
    dataset = build_retro_datasets(project, 2, 2)["train"]
    paths = ProjectPaths(project)
    tokenizer = load_project_tokenizer(ProjectConfig.load(project), paths)

    def show(chunk_id: int) -> str:
        if chunk_id == NO_NEIGHBOR:
            return "end of its document"
        return dataset.database.texts([chunk_id], tokenizer)[0]

    texts = iter(page.found[".text"])
    abouts = iter(about for about in page.found[".about"] if about.startswith("neighbor"))
    distances = SavedDistances(dataset.neighbors.directory)
    for sample in (5, 2):
        item = dataset[sample]
        for chunk in range(4):
            tokens = item["text"][chunk * 16 : chunk * 16 + 16]
            assert next(texts) == tokenizer.detokenize(tokens.tolist())
            for rank, ids in enumerate(item["neighbor_chunks"][chunk]):
                first, following = (show(chunk_id) for chunk_id in ids)
                assert next(texts) == first + following
                about = next(abouts)
                document = int(dataset.database.documents(ids[0])[1])
                place = (
                    f"chunk {ids[0]}, topic-{document} "
                    f"(document {document} of corpus_text_document);"
                )
                row = sample * 4 + chunk
                assert about.startswith(f"neighbor {rank + 1}: {place} distance ")
                assert f"distance {distances.rows(row, row + 1)[0, rank]:.4g};" in about
    assert next(texts, None) is None
    assert len(page.found["svg"]) == 2
    # Its texts repeat, so a good part is shared; what is marked is in both.
    assert len(page.found["mark"]) > 5
    assert result.overlaps.max() > 0.5
    assert len(result.overlaps) == len(result.distances) == 8 * 4 * 2
    assert sum(float(title.split(": ")[1]) for title in page.found["title"][1:]) == 2 * 64


def test_nothing_is_loaded_from_elsewhere(project, tmp_path):
    options = InspectNeighborsOptions(str(project), str(tmp_path / "page.html"), num_samples=3)
    first = inspect_neighbors(options)
    assert len(first.samples) == 3
    text = first.output.read_text()
    page = Reader(text)
    assert not {"script", "link", "img", "iframe"} & set(page.found)
    assert not any("//" in value for value in page.attributes)
    assert "@import" not in text
    assert "url(" not in page.found["style"][0]
    assert inspect_neighbors(options).output.read_text() == text  # the seed says which


def test_every_text_is_escaped(tmp_path):
    evil = "<script>alert(1)</script> & \"quotes\" 'too' </mark>"
    neighbor = NeighborView(evil, [[(evil, True), (evil, False)], None])
    chunks = [ChunkView(0, [(evil, True)], [neighbor]), ChunkView(1, [(evil, False)], [])]
    histograms = [
        Histogram(evil, evil, np.array([0.0, 0.5, 0.5])),
        Histogram(evil, evil, np.empty(0)),
    ]
    page = Page(evil, {evil: evil}, histograms, [SampleView(3, evil, chunks)])
    (tmp_path / "page.html").write_text(render(page), encoding="utf-8")
    read = load(tmp_path / "page.html")
    assert "script" not in read.found
    assert read.found["h1"] == [evil]
    assert read.found["th"] == read.found["td"] == [evil]
    assert read.found[".text"] == [evil, evil + evil + "end of its document", evil]
    assert read.found["mark"] == [evil, evil]
    assert "no neighbors" in read.found[".neighbor"][1]
    assert [title[-1] for title in read.found["title"][1:]].count("2") == 1


def test_pieces_join_to_the_text(project):
    tokenizer = GPTSentencePieceTokenizer(project / "tokenizer" / "sentencepiece.model")
    text = "Ein  grüner Bär — 熊 says: hello there"
    tokens = np.array(tokenizer.tokenize(text))
    generator = np.random.default_rng(0)
    for _ in range(20):
        marked = generator.random(len(tokens)) < 0.5
        pieces = split_text(tokenizer, tokens, marked)
        assert "".join(piece for piece, _ in pieces) == text
    assert split_text(tokenizer, tokens, np.ones(len(tokens), bool)) == [(text, True)]


def test_another_writers_project_has_no_distances(project, tmp_path):
    copy = shutil.copytree(project, tmp_path / "project")
    for path in copy.glob("query/*/distances"):
        shutil.rmtree(path)
    result = inspect_neighbors(
        InspectNeighborsOptions(str(copy), str(tmp_path / "page.html"), num_samples=1)
    )
    assert not len(result.distances)
    page = load(result.output)
    assert page.found["figcaption"][0] == "distance of a neighbor: none were saved"
    assert "distance unknown" in page.found[".neighbor"][0]


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--samples", "8"], "--samples: 8, but train has samples 0 to 7"),
        (["--num-neighbors", "6"], "num_neighbors: 6, but 5 were saved"),
        (["--num-neighbors", "0"], "--num-neighbors: 0"),
        (["--project-dir", "nowhere"], "nowhere/config.json: no such file"),
    ],
)
def test_mistakes_are_named(project, tmp_path, capsys, flags, found):
    output = tmp_path / "page.html"
    assert command.main(["--project-dir", str(project), "--output", str(output), *flags]) == 2
    assert found in capsys.readouterr().err
    assert not output.exists()
