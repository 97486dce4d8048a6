"""Tokens that were made elsewhere as a corpus."""

from dataclasses import replace

import numpy as np
import pytest

from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from retro_mcore.data.tokenizers.loading import GPTSentencePieceTokenizer
from retro_mcore.data.tokens.indexed_dataset import write_indexed_dataset
from retro_mcore.data.tokens.token_file import TokenFile, bin_path, idx_path
from retro_mcore.data.tokens.token_input import check_token_input, find_token_input
from retro_mcore.errors import CorpusError, ProjectError, TokenizerError
from retro_mcore.project import ProjectPaths
from tests.unit.data.projects import built_project, preprocess_options

NAME = "corpus_text_document"


@pytest.fixture(scope="module")
def made():
    """The paths of a project whose tokens are taken, and its tokenizer."""
    paths = ProjectPaths(built_project())
    return paths, GPTSentencePieceTokenizer(paths.tokenizer / "sentencepiece.model")


def write(prefix, documents, dtype=np.uint16):
    arrays = [np.array(document) for document in documents]
    write_indexed_dataset(bin_path(prefix), idx_path(prefix), arrays, dtype)
    return prefix


def options_for(made, project, source):
    model = str(made[0].tokenizer / "sentencepiece.model")
    return preprocess_options(project, source, tokenizer_model=model)


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_a_pair_is_found_by_any_of_its_names(made, ending):
    prefix = made[0].data / NAME
    assert find_token_input(made[0].data / f"{NAME}{ending}") == prefix
    assert find_token_input(made[0].root) is None
    with pytest.raises(CorpusError, match=r"none\.bin: no such file.*both files"):
        find_token_input(made[0].data / "none.idx")


def test_a_project_on_given_tokens_is_that_on_their_text(made, tmp_path):
    paths, _ = made
    options = options_for(made, tmp_path / "project", paths.data / f"{NAME}.bin")
    result = preprocess_corpus(options)
    ours = ProjectPaths(tmp_path / "project")
    for path in (bin_path, idx_path):
        assert path(ours.data / NAME).read_bytes() == path(paths.data / NAME).read_bytes()
    assert result.num_documents == len(TokenFile(paths.data / NAME))
    assert result.config.retro_gpt_data_path == ["1.0", NAME]
    assert not result.reused
    assert preprocess_corpus(options).reused
    other = write(tmp_path / NAME, [[5, 2]] * 20)
    with pytest.raises(ProjectError, match=rf"--input {NAME}\.bin: is not what preprocess_corpus"):
        preprocess_corpus(replace(options, input=[str(tmp_path / f"{NAME}.bin")]))
    assert other.with_suffix(".bin").is_file()


def test_their_tokenizer_must_be_given(made, tmp_path):
    options = options_for(made, tmp_path / "project", made[0].data / NAME)
    with pytest.raises(TokenizerError, match="holds tokens, and no tokenizer is given"):
        preprocess_corpus(replace(options, tokenizer_model=None))
    assert not (tmp_path / "project").exists()


def test_tokens_of_another_tokenizer_are_refused(made, tmp_path):
    _, tokenizer = made
    eod, size = tokenizer.eod, tokenizer.vocab_size
    check_token_input(write(tmp_path / "good", [[size - 1, eod], [eod]]), tokenizer)
    with pytest.raises(
        TokenizerError, match=rf"large\.bin: holds token id {size}, but .* {size}\."
    ):
        check_token_input(write(tmp_path / "large", [[size, eod]]), tokenizer)
    with pytest.raises(TokenizerError, match=r"1 of 2 documents do not end .*--append-eod"):
        check_token_input(write(tmp_path / "open", [[5, eod], [5]]), tokenizer)
    with pytest.raises(CorpusError, match="holds an empty document"):
        check_token_input(write(tmp_path / "empty", [[5, eod], []]), tokenizer)


def test_several_sequences_per_document_are_refused(made, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path / "sentences"
    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=np.uint16)
    builder.add_document(np.array([5, 6, 7, made[1].eod]), [2, 2])
    builder.finalize(str(idx_path(prefix)))
    with pytest.raises(CorpusError, match=r"2 sequences for 1 documents.*--split-sentences"):
        check_token_input(prefix, made[1])


def _put(path, offset, data):
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (lambda prefix: idx_path(prefix).write_bytes(b""), "not a Megatron index"),
        (lambda prefix: idx_path(prefix).write_bytes(b"\0" * 200), "not a Megatron index"),
        (lambda prefix: bin_path(prefix).write_bytes(b"\0" * 3), "3 bytes, not"),
        (lambda prefix: _put(idx_path(prefix), 34, (-1).to_bytes(4, "little", signed=True)), ""),
        # The first pointer, behind the header and two lengths.
        (lambda prefix: _put(idx_path(prefix), 34 + 8, (1 << 40).to_bytes(8, "little")), "places"),
        (lambda prefix: _put(idx_path(prefix), 34 + 8, b"\xff" * 8), "places"),
        (lambda prefix: _put(bin_path(prefix), 0, b"\xff" * 4), "holds token id -1"),
    ],
)
def test_damaged_pairs_are_named(made, tmp_path, harm, found):
    """Of a copy that was cut short, or of another program."""
    prefix = write(tmp_path / "pair", [[5, 6, made[1].eod], [7, made[1].eod]], np.int32)
    check_token_input(prefix, made[1])
    harm(prefix)
    with pytest.raises(CorpusError, match=rf"pair\.(bin|idx): .*{found}"):
        check_token_input(prefix, made[1])
