"""Static embedders: means of token vectors, as model2vec, sentence-transformers and wordllama."""

import importlib.util
import json
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, StaticEmbedding
from tokenizers import Tokenizer

from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.build_index import BuildIndexOptions, build_index
from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from retro_mcore.errors import ConfigurationError, MissingDependencyError
from retro_mcore.project.config import ProjectSettings
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import recorded_options
from retro_mcore.retrieval.bert_tokens import default_bert_vocab
from retro_mcore.retrieval.embedders import build_embedder, default_precision, precision
from retro_mcore.retrieval.embedders.base import embed_unique
from retro_mcore.retrieval.embedders.static_models import installed_files
from retro_mcore.retrieval.retriever import Retriever
from retro_mcore.retrieval.vectors import EmbeddingCounts
from tests.unit.data.projects import documents, preprocess_options, write_corpus

TEXTS = ["A dog chases a cat.", "\u2603 unknown \U0001f9ee", "", "word " * 2000, "Rates rose."]
UNKNOWN = 100
COMMIT = "a" * 40


@pytest.fixture(scope="module")
def parts():
    """MiniLM's token vectors and its tokenizer: a real static model."""
    folder = default_bert_vocab().parent
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("word_embeddings.weight")]
    return weights[name], folder / "tokenizer.json"


def save(folder, tensors, tokenizer, config=None, modules=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(tokenizer, folder)
    for name, content in (("config.json", config), ("modules.json", modules)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return str(folder)


def token_ids(path, text):
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [t for t in tokenizer.encode(text, add_special_tokens=False).ids if t != UNKNOWN]


def test_a_model2vec_folder(parts, tmp_path):
    """Means by hand, with model2vec's mapping and weights; the unknown token is left out."""
    table, tokenizer = parts
    random = np.random.default_rng(0)
    tensors = {
        "embeddings": table[:500, :32].astype(np.float16),
        "mapping": random.integers(0, 500, len(table)),
        "weights": random.random(len(table)),
    }
    for normalize in (True, False):
        name = save(tmp_path / str(normalize), tensors, tokenizer, {"normalize": normalize})
        embedder = build_embedder(name)
        vectors = embedder.embed(TEXTS)
        assert vectors.shape == (5, embedder.dimension) == (5, 32)
        for text, vector in zip(TEXTS, vectors, strict=True):
            ids = token_ids(tokenizer, text)
            rows = tensors["embeddings"].astype(np.float64)[tensors["mapping"][ids]]
            mean = (rows * tensors["weights"][ids][:, None]).sum(0) / max(len(ids), 1)
            if normalize and ids:
                mean /= np.linalg.norm(mean)
            # Sums of up to 2,000 numbers in single precision.
            np.testing.assert_allclose(vector, mean, rtol=0, atol=1e-5 * (1 + np.abs(mean).max()))
    assert embedder.embed([]).shape == (0, 32)
    counts = EmbeddingCounts()
    embed_unique(embedder, TEXTS, counts)
    assert (counts.chunks_cut, counts.zero) == (0, 1)  # no limit of tokens


def test_a_sentence_transformers_folder(parts, tmp_path):
    """As the library itself computes it, in both of its layouts."""
    table, path = parts
    static = StaticEmbedding(Tokenizer.from_file(str(path)), embedding_weights=table[:, :16].copy())
    static.tokenizer.no_truncation()
    for modules in ([static], [static, Normalize()]):
        model, folder = SentenceTransformer(modules=modules), tmp_path / str(len(modules))
        model.save_pretrained(str(folder))
        embedder = build_embedder(str(folder))
        assert type(embedder).__name__ == "StaticEmbedder"
        texts = [text for text in TEXTS if text]
        np.testing.assert_allclose(embedder.embed(texts), model.encode(texts), atol=1e-5)


def test_options_that_a_static_model_lacks(parts, tmp_path):
    table, tokenizer = parts
    name = save(tmp_path / "static", {"embedding.weight": table[:, :8].copy()}, tokenizer)
    assert default_precision(name, "cpu") == "fp32"
    for arguments, found in (
        ({"pooling": "mean"}, "--embedder-pooling: a static model is a mean"),
        ({"batch_tokens": 64}, "--embed-batch-tokens: .* is not batched by tokens"),
    ):
        with pytest.raises(ConfigurationError, match=found):
            build_embedder(name, device="cpu", **arguments)
    short = {"embedding.weight": table[:99, :8].copy()}
    with pytest.raises(ConfigurationError, match="99 vectors for 30522 tokens"):
        build_embedder(save(tmp_path / "short", short, tokenizer))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        "retro_mcore.retrieval.embedders.static_models.find_spec", lambda name: None
    )
    with pytest.raises(MissingDependencyError, match="pip install wordllama"):
        build_embedder("static")


def test_the_installed_model_is_wordllamas():
    """Its own loader looks for the tokenizer in another folder than the one that it ships."""
    inference = pytest.importorskip(
        "wordllama.inference",
        reason="wordllama, an optional package, is not installed",
        exc_type=ImportError,
    )
    files = installed_files()
    table = load_file(files.weights)["embedding.weight"]
    theirs = inference.WordLlamaInference(table, Tokenizer.from_file(str(files.tokenizer)))
    embedder, texts = build_embedder("static"), [TEXTS[0], TEXTS[4], "word " * 300]
    np.testing.assert_allclose(embedder.embed(texts), theirs.embed(texts, norm=True), atol=1e-5)
    assert embedder.dimension == 256


def test_a_project_with_a_static_model(parts, tmp_path):
    table, tokenizer = parts
    name = save(tmp_path / "static", {"embeddings": table[:, :64].copy()}, tokenizer)
    corpus = write_corpus(tmp_path / "corpus.jsonl", documents())
    project = tmp_path / "project"
    preprocess_corpus(preprocess_options(project, corpus))
    build_db(BuildDbOptions(str(project)))
    report = build_index(BuildIndexOptions(str(project), embedder=name, index="Flat"))
    assert report.embedded.counts.chunks_cut == 0
    settings = ProjectSettings.load(project)
    assert (settings.embed_precision, settings.embeddings_dtype) == ("fp32", "fp32")
    retriever = Retriever(project)
    texts = retriever.database.texts([3, 40], retriever.tokenizer)
    found = retriever.search_texts(texts)
    assert retriever.database.texts(found.ids[:, 0], retriever.tokenizer) == texts


class Hub(ThreadingHTTPServer):
    """The files of models, by "owner/name/resolve/main/file"; others are answered as a hub does."""

    def __init__(self, files: dict[str, bytes]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = files.get(self.path.strip("/"))
                self.send_response(404 if content is None else 200)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", '"1"')
                self.send_header("Content-Length", str(len(content or b"")))
                if content is None:
                    self.send_header("X-Error-Code", "EntryNotFound")
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content or b"")

            do_HEAD = do_GET

            def log_message(self, *args) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of a hub, and a processor whose automatic precision is bf16."""
    monkeypatch.setattr(precision, "processor_features", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_precision_of_a_hubs_model_that_is_not_here_yet(cache, monkeypatch):
    """Its list of modules is looked up, as loading it does."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    kinds = ("sentence_transformers.models.StaticEmbedding", "sentence_transformers.Transformer")
    lists = {f"a/{kind.split('.')[-1]}": [{"path": "", "type": kind}] for kind in kinds}
    files = {f"{name}/resolve/main/modules.json": json.dumps(lists[name]) for name in lists}
    with Hub({name: content.encode() for name, content in files.items()}) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            f"http://127.0.0.1:{hub.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        )
        for name, wanted in (
            ("a/StaticEmbedding", "fp32"),
            ("a/Transformer", "bf16"),
            ("a/without-modules", "bf16"),  # loaded as a transformer
        ):
            assert default_precision(name, "cpu") == wanted
        hub.shutdown()
    assert default_precision("a/StaticEmbedding", "cpu") == "fp32"  # now in the cache
    assert default_precision("a/Transformer", "cpu") == "bf16"
    assert default_precision("a/without-modules", "cpu") == "bf16"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert default_precision("a/out-of-reach", "cpu") == "fp32"


@pytest.mark.parametrize("layout", ["static", "encoder"])
def test_auto_embeds_a_hubs_model_of_any_kind(
    parts, tiny_bert, tmp_path, cache, monkeypatch, layout
):
    """What it chooses, the model can compute in, and the record names."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = cache / "models--a--b" / "snapshots" / COMMIT
    if layout == "encoder":
        shutil.copytree(tiny_bert, folder)
    else:
        static = StaticEmbedding(
            Tokenizer.from_file(str(parts[1])), embedding_weights=parts[0][:, :16].copy()
        )
        SentenceTransformer(modules=[static]).save_pretrained(str(folder))
    (cache / "models--a--b" / "refs").mkdir()
    (cache / "models--a--b" / "refs" / "main").write_text(COMMIT)
    project = tmp_path / "project"
    preprocess_corpus(
        preprocess_options(
            project, write_corpus(tmp_path / "corpus.jsonl", documents()), samples="aligned"
        )
    )
    build_db(BuildDbOptions(str(project)))
    build_index(BuildIndexOptions(str(project), embedder="a/b", index="Flat"))
    wanted = "bf16" if layout == "encoder" else "fp32"
    assert ProjectSettings.load(project).embed_precision == wanted
    recorded = recorded_options(ProjectPaths(project), "build_index")
    assert recorded.get("--embed-precision", "fp32") == wanted
