"""Embedders: what they give, and that nothing around them changes it."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.build_index import BuildIndexOptions, build_index
from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from retro_mcore.cli.query_neighbors import QueryNeighborsOptions, query_neighbors
from retro_mcore.errors import ConfigurationError, ProjectError
from retro_mcore.project import ProjectPaths
from retro_mcore.retrieval import embedders
from retro_mcore.retrieval.bert_tokens import default_bert_vocab
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.embedders import build_embedder
from retro_mcore.retrieval.embedders.base import Embedder
from retro_mcore.retrieval.embedders.lexical import LexicalEmbedder, count_texts, weights_of
from retro_mcore.retrieval.retriever import Retriever
from retro_mcore.samples.retro_dataset import build_retro_datasets
from tests.processes import run_ranks
from tests.unit.data.projects import documents, preprocess_options, write_corpus


def around_use_cpu():
    """Embeddings before and after the CPU platform replaces torch's CUDA queries and factories."""
    from retro_mcore.platform import is_cpu_in_use, use_cpu

    texts = ["A dog chases a cat.", "Interest rates rose.", "", "x" * 400]
    assert not is_cpu_in_use()
    before = build_embedder("minilm", device="cpu").embed(texts)
    use_cpu()
    return before, build_embedder("minilm", device="cpu").embed(texts)


def test_an_encoder_loaded_after_use_cpu_gives_the_same_embeddings():
    ((before, after),) = run_ranks(1, around_use_cpu)
    assert before.shape == (4, 384)
    assert np.isfinite(before).all()
    # Another place in memory may round the last bits of unit vectors otherwise.
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def lexical(tmp_path_factory):
    texts = documents(40, 2000)
    path = tmp_path_factory.mktemp("lexical") / "weights.npy"
    np.save(path, weights_of(count_texts(texts)))
    return LexicalEmbedder.load(path), texts, path


def test_the_lexical_embedder_finds_near_duplicates(lexical):
    embedder, texts, _ = lexical
    assert len(set(texts)) == len(texts) == 40
    vectors = embedder.embed(texts)
    assert vectors.shape == (40, embedder.dimension) == (40, 256)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    # A text without every seventh word, and the second half of the same text.
    for cut in (
        lambda words: [w for i, w in enumerate(words) if i % 7],
        lambda words: words[len(words) // 2 :],
    ):
        queries = [" ".join(cut(text.split())) for text in texts[:20]]
        scores = embedder.embed(queries) @ vectors.T
        twins = np.arange(20)  # the second half of `texts` repeats the first with one more word
        best = np.sort(np.argsort(-scores, axis=1)[:, :2] % 20, axis=1)
        assert (best == twins[:, None]).all(), best


def test_lexical_weights_prefer_rare_words():
    texts = [f"the common word{i}" for i in range(50)]
    embedder = LexicalEmbedder(weights_of(count_texts(texts)))
    query, same, other = embedder.embed(["a word7 here", texts[7], texts[8]])
    assert query @ same > 0.3 > abs(query @ other)
    assert not embedder.embed(["", " \n"]).any()
    assert embedder.embed([]).shape == (0, 256)


def test_lexical_vectors_are_the_same_bytes_everywhere(lexical):
    """Against bytes that were recorded once, and in another process of another hash seed."""
    embedder, texts, path = lexical
    weights = weights_of(count_texts(["a b", "b c", "Grüße, Welt!"]))
    vectors = LexicalEmbedder(weights).embed(["a b c", "Grüße", "b b"])
    assert hashlib.sha256(vectors.tobytes()).hexdigest()[:16] == "e14df0db032e2b00"
    parts = count_texts(["a b"]) + count_texts(["b c", "Grüße, Welt!"])
    np.testing.assert_array_equal(weights_of(parts), weights)
    script = (
        "import sys, pathlib, hashlib\n"
        "from retro_mcore.retrieval.embedders.lexical import LexicalEmbedder\n"
        "embedder = LexicalEmbedder.load(pathlib.Path(sys.argv[1]))\n"
        "print(hashlib.sha256(embedder.embed([sys.argv[2]]).tobytes()).hexdigest())"
    )
    told = subprocess.run(
        [sys.executable, "-c", script, str(path), texts[3]],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert told.stdout.strip() == hashlib.sha256(embedder.embed([texts[3]]).tobytes()).hexdigest()


def test_pooling_of_a_hugging_face_encoder():
    """Against the model's own hidden states, text by text; batches and padding change nothing."""
    from transformers import AutoModel, AutoTokenizer

    texts = ["A dog chases a cat.", "Rates rose.", "", "word " * 700]
    folder = str(default_bert_vocab().parent)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    model.eval()
    mean = build_embedder("minilm", 3, "cpu", "mean")
    cls = build_embedder(folder, 2, "cpu", "cls")
    assert (mean.dimension, cls.name) == (384, folder)
    of_mean, of_cls = mean.embed(texts), cls.embed(texts)
    with torch.inference_mode():
        for row, text in enumerate(texts):
            encoded = tokenizer(text, truncation=True, max_length=512, return_tensors="pt")
            hidden = model(**encoded).last_hidden_state[0].numpy()
            np.testing.assert_allclose(of_mean[row], hidden.mean(0), atol=1e-5)
            np.testing.assert_allclose(of_cls[row], hidden[0], atol=1e-5)
    ours = mean.embed(texts[:1])[0]
    theirs = build_embedder("minilm", device="cpu").embed(texts[:1])[0]
    np.testing.assert_allclose(ours / np.linalg.norm(ours), theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"pooling": "max"}, "--embedder-pooling: max"),
        ({"precision": "fp16"}, "--embed-fp16: on the CPU"),
        ({"name": "nowhere", "pooling": "cls"}, "--embedder: 'nowhere' cannot be loaded"),
        ({"name": "lexical", "pooling": "cls"}, "--embedder-pooling: lexical has no model"),
        ({"name": ""}, "--embedder: '' cannot be loaded"),
    ],
)
def test_options_that_do_not_go_together(arguments, found):
    with pytest.raises(ConfigurationError) as caught:
        build_embedder(**{"device": "cpu", **arguments})
    assert str(caught.value).startswith(found)


def _without_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, folder / "model.safetensors")


def _without_a_tokenizer(folder):
    for file in (*folder.glob("*token*"), folder / "vocab.txt"):
        file.unlink()


def _cut(folder):
    os.truncate(folder / "model.safetensors", 1000)


@pytest.mark.parametrize("pooling", [None, "mean"])
@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (
            _without_a_weight,
            r"1 weights, such as encoder\.layer\.0\.output\.dense\.weight, .*random",
        ),
        (_without_a_tokenizer, r"cannot be loaded \(.*"),
        (_cut, r"cannot be loaded \(.*[Ee]rror while deserializing"),
    ],
)
def test_a_folder_that_lacks_something_is_refused(tiny_bert, harm, found, pooling):
    """Its vectors would be random, or those of unknown words; and look like any others."""
    assert build_embedder(str(tiny_bert), 1, "cpu", pooling).dimension == 8
    harm(tiny_bert)
    with pytest.raises(ConfigurationError, match=found):
        build_embedder(str(tiny_bert), 1, "cpu", pooling)


def test_the_positions_of_roberta(tiny_bert):
    """Its first positions stand for padding; a text of as many tokens as rows ended the run."""
    from transformers import RobertaConfig, RobertaModel

    sizes = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, "pad_token_id": 0}
    sizes |= {"vocab_size": 30522, "num_hidden_layers": 1, "max_position_embeddings": 40}
    config = RobertaConfig(**sizes)
    RobertaModel(config, add_pooling_layer=False).save_pretrained(tiny_bert)
    embedder = build_embedder(str(tiny_bert), 2, "cpu", "mean")
    assert embedder.max_tokens == 39
    assert np.isfinite(embedder.embed(["word " * 700, "a"])).all()


def test_a_project_with_the_lexical_embedder(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", documents())
    project = tmp_path / "project"
    preprocess_corpus(preprocess_options(project, corpus))
    build_db(BuildDbOptions(str(project)))
    index_options = BuildIndexOptions(str(project), embedder="lexical")
    assert build_index(index_options).recall.at[2] == 1.0
    query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=3))
    weights = ProjectPaths(project).lexical_weights
    before = weights.stat().st_mtime_ns
    assert build_index(index_options).reused
    assert weights.stat().st_mtime_ns == before
    with pytest.raises(ProjectError, match=r"--embedder: .*'lexical', asked for 'minilm'"):
        build_index(BuildIndexOptions(str(project)))
    # Both copies of a repeated text are in the database; the neighbors are of the other one.
    database = ChunkDatabase.open(project)
    dataset = build_retro_datasets(project, num_neighbors=1)["train"]
    overlap = []
    for sample in range(len(dataset)):
        item = dataset[sample]
        for chunk, first in enumerate(item["neighbor_chunks"][:, 0, 0]):
            own = set(item["text"][chunk * 16 : chunk * 16 + 16].tolist())
            overlap.append(len(own & set(database.tokens([first])[0].tolist())) / len(own))
    assert np.mean(overlap) > 0.4
    # Live retrieval finds a chunk by its own text, with the weights of the project.
    retriever = Retriever(project)
    texts = database.texts([3, 40], retriever.tokenizer)
    found = retriever.search_texts(texts)
    assert database.texts(found.ids[:, 0], retriever.tokenizer) == texts
    np.testing.assert_allclose(found.distances[:, 0], 0, atol=1e-5)


def test_a_registered_kind_is_asked_first(monkeypatch):
    monkeypatch.setattr(embedders, "_registered", [])
    is_mine, built = "mine".__eq__, []
    mine = Mine()

    def build(*given):
        built.append(given)
        return mine

    for _ in range(2):
        embedders.register_embedder(is_mine, build)
    assert len(embedders._registered) == 1
    assert build_embedder("mine", 4, "cpu", "cls") is mine
    assert built == [("mine", 4, "cpu", "cls")]


class Unnamed(Embedder):
    dimension = 2

    def embed(self, texts):
        return np.zeros((len(texts), self.dimension), np.float32)


class Mine(Unnamed):
    name = "mine"


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("built", "found"),
    [
        (None, "not an Embedder but NoneType"),
        (object(), "not an Embedder but object"),
        (Unnamed(), "an Embedder without name"),
    ],
)
def test_a_registered_kind_must_be_an_embedder(monkeypatch, built, found, precision):
    monkeypatch.setattr(embedders, "_registered", [("mine".__eq__, lambda *_: built)])
    with pytest.raises(ConfigurationError, match=f"'mine' returns {found}.*embedders.base.Embed"):
        build_embedder("mine", device="cpu", precision=precision)
