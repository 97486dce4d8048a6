"""Bits per byte: windows, losses, bytes, and the leakage curve."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from retro_mcore.errors import ConfigurationError
from tests.unit.evaluation.texts import (
    CHUNK_LENGTH,
    EOD,
    NUM_NEIGHBORS,
    RETRIEVED_CHUNKS,
    RandomDatabase,
    RandomRows,
    random_documents,
)
from tests.unit.inference.small import small_model

pytestmark = pytest.mark.usefixtures("megatron")

LENGTHS = [70, 2, 9, 33, 25, 17]
WINDOW, STRIDE = 32, 16


@pytest.mark.parametrize(("window", "stride"), [(32, 8), (32, 16), (32, 32), (64, 24)])
def test_every_token_but_the_first_is_predicted_once_with_the_overlap_before_it(window, stride):
    from retro_mcore.evaluation.windows import plan_windows

    counts = [np.zeros(length, int) for length in LENGTHS]
    for part in plan_windows(LENGTHS, window, stride):
        assert part.start % 8 == 0
        assert part.length <= window
        assert part.start == 0 or part.scored_from >= window - stride
        scored = slice(part.start + part.scored_from + 1, part.start + part.length + 1)
        counts[part.document][scored] += 1
    for count in counts:
        assert count.tolist() == [0] + [1] * (len(count) - 1)


@pytest.mark.parametrize("stride", [0, 12, 40])
def test_windows_that_leave_gaps_or_cut_chunks_are_refused(stride):
    from retro_mcore.evaluation.windows import check_stride

    with pytest.raises(ConfigurationError, match="--overlapping-eval: windows of 32"):
        check_stride(stride, 32, 8)


def losses_one_by_one(model, documents, neighbors, database):
    """Each token's loss from the window it belongs to, found by search and read alone."""
    losses = []
    for document, length in enumerate(LENGTHS):
        tokens = documents.tokens(document)
        for position in range(1, length):
            start = 0
            while start + WINDOW < position:
                start += STRIDE
            read = torch.from_numpy(tokens[start:position])[None]
            row = documents.first_rows[document] + start // CHUNK_LENGTH
            complete = (position - start) // CHUNK_LENGTH
            context = {}
            if neighbors is not None and complete:
                ids = neighbors.rows(row, row + complete)[None]
                retrieved, mask = database.retrieved_tokens(ids, 2, CHUNK_LENGTH, EOD)
                context["context_input_ids"] = torch.from_numpy(retrieved).flatten(0, 2)
                context["context_mask"] = torch.from_numpy(mask).flatten(0, 2)
            with torch.no_grad():
                logits = model(read, torch.arange(read.shape[1])[None], None, **context)
            losses.append(-logits[0, -1].double().log_softmax(-1)[tokens[position]].item())
    return losses


@pytest.mark.parametrize("retrieval", [True, False])
def test_losses_are_those_of_each_token_read_alone(retrieval):
    from retro_mcore.evaluation.chunk_losses import measure_chunk_losses
    from retro_mcore.evaluation.windows import WindowReader, plan_windows

    documents, database = random_documents(LENGTHS), RandomDatabase()
    neighbors = RandomRows(documents.num_chunks) if retrieval else None
    model = small_model()
    expected = np.zeros(documents.num_chunks)
    tokens = np.zeros(documents.num_chunks)
    each = iter(losses_one_by_one(model, documents, neighbors, database))
    for document, length in enumerate(LENGTHS):
        for position in range(1, length):
            row = documents.first_rows[document] + position // CHUNK_LENGTH
            expected[row] += next(each)
            tokens[row] += 1
    for batch_size in (1, 3, 20):
        measured = measure_chunk_losses(
            model,
            WindowReader(documents, neighbors, database, NUM_NEIGHBORS, RETRIEVED_CHUNKS),
            plan_windows(LENGTHS, WINDOW, STRIDE),
            np.ones(documents.num_chunks, np.int64),
            batch_size,
            "test",
        )
        assert measured.tokens.tolist() == tokens.tolist()
        np.testing.assert_allclose(measured.losses, expected, rtol=1e-5)
        bits = measured.losses.sum() / math.log(2) / documents.num_chunks
        assert measured.bits_per_byte() == pytest.approx(bits)


def test_each_corpus_has_its_own_numbers():
    from retro_mcore.evaluation.bits_per_byte import summarize
    from retro_mcore.evaluation.chunk_losses import ChunkLosses

    documents = random_documents([20, 12], [0, 1])
    losses = ChunkLosses(
        np.array([1.0, 2, 3, 4, 5]), np.array([7, 8, 4, 7, 4]), np.array([10, 20, 30, 40, 50])
    )
    result = summarize(documents, losses, "real", 32, 16, 0.0)
    assert result.loss == pytest.approx(15 / 30)
    assert result.bits_per_byte == pytest.approx(15 / math.log(2) / 150)
    assert list(result.corpora) == ["books", "code"]
    assert result.corpora["books"].bits_per_byte == pytest.approx(6 / math.log(2) / 60)
    assert result.corpora["code"].perplexity == pytest.approx(math.exp(9 / 11))
    assert result.corpora["code"].num_documents == 1


TEXTS = [
    "Plain words, and then some more of them.",
    "Ångström — naïve façade 日本語 🙂🙂 né",
    "  x",
]


@pytest.mark.parametrize("chunk_length", [2, 3, 8])
def test_bytes_are_those_of_the_text_after_the_first_token(tmp_path, chunk_length):
    from retro_mcore.data.tokenizers.loading import GPTSentencePieceTokenizer, train_sentencepiece
    from retro_mcore.evaluation.documents import _bytes_of_chunks

    path = tmp_path / "tokenizer.model"
    train_sentencepiece(["some plain words of text, and more of them"] * 3, 290, path)
    tokenizer = GPTSentencePieceTokenizer(path)
    for text in TEXTS:
        tokens = tokenizer.tokenize(text)
        counts = _bytes_of_chunks(tokens, chunk_length, tokenizer)
        first = len(tokenizer.detokenize(tokens[:1]).encode())
        assert sum(counts) == len(text.encode()) - first
        assert len(counts) == -(-len(tokens) // chunk_length)


class PlantedDatabase(RandomDatabase):
    """A database whose chunk 4 goes on with the first tokens of a document."""

    def __init__(self, text):
        super().__init__()
        self.chunks[:] = 1000
        self.chunks[4, 5:] = text[8:11]
        self.chunks[5, :3] = text[11:14]


class EverybodysNeighbors(RandomRows):
    def rows(self, start, end):
        return np.tile([7, 4, -1], (end - start, 1))


def test_overlap_is_the_longest_common_run_with_any_neighbor_and_its_continuation():
    from retro_mcore.evaluation.leakage import chunk_overlaps

    documents = random_documents([20, 11])
    database = PlantedDatabase(documents.tokens(0))
    neighbors = EverybodysNeighbors(documents.num_chunks)
    overlaps = chunk_overlaps(documents, neighbors, database, 3, 2)
    assert overlaps[1] == 6 / 8
    assert np.delete(overlaps, 1).max() <= 1 / 8  # a token by chance
    assert chunk_overlaps(documents, neighbors, database, 1, 2).tolist() == [0] * 5


def test_a_short_chunk_is_measured_by_its_own_length():
    from retro_mcore.evaluation.leakage import chunk_overlaps

    documents = random_documents([14])
    database = PlantedDatabase(documents.tokens(0))
    overlaps = chunk_overlaps(documents, EverybodysNeighbors(2), database, 3, 2)
    assert overlaps[1] == 1


def test_the_curve_keeps_the_chunks_up_to_alpha(tmp_path):
    from retro_mcore.evaluation.chunk_losses import ChunkLosses
    from retro_mcore.evaluation.leakage import leakage_curve, plot_leakage

    tokens = np.array([8, 8, 8])
    num_bytes = np.array([10, 10, 20])
    losses = {
        "real": ChunkLosses(np.array([8.0, 4, 1]), tokens, num_bytes),
        "none": ChunkLosses(np.array([8.0, 8, 16]), tokens, num_bytes),
    }
    curve = leakage_curve(np.array([0.25, 0.5, 1]), losses, [0.125, 0.25, 0.5, 1.0])
    assert [point.num_chunks for point in curve] == [0, 1, 2, 3]
    assert [point.num_bytes for point in curve] == [0, 10, 20, 40]
    assert curve[2].bits_per_byte["real"] == pytest.approx(12 / 20 / math.log(2))
    assert curve[3].bits_per_byte["none"] == pytest.approx(32 / 40 / math.log(2))
    assert math.isnan(curve[0].bits_per_byte["real"])
    assert curve[0].as_json()["bits_per_byte"] == {"real": None, "none": None}
    plot_leakage({"valid": curve}, tmp_path / "leakage.png")
    assert (tmp_path / "leakage.png").read_bytes().startswith(b"\x89PNG")
