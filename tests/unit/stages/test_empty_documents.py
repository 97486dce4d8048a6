"""Documents without text, in an aligned project from its tokens to a training sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.cli import verify
from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.build_index import BuildIndexOptions, build_index
from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from retro_mcore.cli.query_neighbors import QueryNeighborsOptions, query_neighbors
from retro_mcore.data.tokenizers.loading import build_tokenizer
from retro_mcore.data.tokens.indexed_dataset import write_indexed_dataset
from retro_mcore.data.tokens.token_file import bin_path, idx_path
from retro_mcore.evaluation.document_rows import saved_document_neighbors
from retro_mcore.evaluation.documents import HeldOutDocuments
from retro_mcore.project.config import SPLITS
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.samples.retro_dataset import build_retro_datasets
from tests.unit.data.aligned import M, save_tokenizer
from tests.unit.data.projects import documents, preprocess_options

#: Documents in turn: a text, or one of those without: EOD alone, BOS and EOD, and padding.
KINDS = 4


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An aligned project on given tokens, three quarters of which are empty documents."""
    folder = tmp_path_factory.mktemp("empty")
    model = save_tokenizer(folder, True)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", model)
    (bos,), eod = tokenizer.beginning, tokenizer.eod
    rows: list[list[int]] = []
    for text in documents(14, 90):
        rows += [[bos, *tokenizer.tokenize(text), eod], [eod], [bos, eod], [eod] * M]
    given = folder / "given"
    write_indexed_dataset(bin_path(given), idx_path(given), map(np.array, rows), np.uint16)
    changes: dict = {"tokenizer_model": str(model), "samples": "aligned", "eval_iters": 4}
    options = preprocess_options(folder / "project", given, **changes)
    report = preprocess_corpus(options).report
    assert report["documents_without_text"] == 2 * 14  # one more kind holds BOS
    assert report["repeated_eods_dropped"] == (M - 1) * 14
    name = str(folder / "project")
    build_db(BuildDbOptions(name))
    build_index(BuildIndexOptions(name, embedder="lexical"))
    query_neighbors(QueryNeighborsOptions(name, num_neighbors_save=3))
    return folder / "project"


def test_empty_documents_have_no_row_no_neighbors_and_no_text_to_learn(project: Path) -> None:
    for name in ("train", "valid"):
        assert not (ChunkDatabase.open(project, name, own=True).chunks[:, 1] % KINDS).any()
    datasets = build_retro_datasets(project, 1, 1)
    for split in SPLITS:
        dataset, seen = datasets[split], set()
        assert dataset is not None
        for index in range(len(dataset)):
            item = dataset[index]
            _, numbers, _ = dataset.samples.chunk_places(index, M)
            found = item["neighbor_chunks"][:, 0, 0]
            counted = item["loss_mask"].reshape(-1, M)
            for number, neighbor, mask in zip(numbers % KINDS, found, counted, strict=True):
                seen.add(int(number))
                if number:
                    assert neighbor == NO_NEIGHBOR
                    # After BOS, the end is predicted.
                    assert mask.tolist() == [float(number == 2)] + [0.0] * (M - 1)
            assert (item["neighbor_tokens"] >= 0).all()
        assert len(seen) > 1
    held_out = HeldOutDocuments.open(project, "valid", datasets["train"].eod)
    assert not (held_out.number % KINDS).any()
    assert held_out.num_too_short == sum(held_out.num_in_split) - len(held_out)
    assert saved_document_neighbors(project, held_out, 1) is not None


def test_verify_compares_the_tables_of_chunks(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = ["--project-dir", str(project)]
    assert verify.main(whole) == 0
    for name in ("chunks_train", "chunks_valid"):
        for folder in (name, f"{name}/distances"):
            path = next((project / "query" / folder).glob("*.hdf5"))
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            assert verify.main(whole) == 2
            assert f"{path}: its bytes differ" in capsys.readouterr().err
            path.unlink()
            assert verify.main(whole) == 2
            assert f"{path}: is missing" in capsys.readouterr().err
            path.write_bytes(content)
    assert verify.main(whole) == 0
