"""Samples as upstream's, and the tokens retrieved for them."""

import dataclasses
import errno
import hashlib
import json
import logging
import pickle
import shutil
import sys

import h5py
import numpy as np
import pytest
from torch.utils.data import DataLoader

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.data.tokens.indexed_dataset import token_dtype, write_indexed_dataset
from retro_mcore.data.tokens.splits import check_documents, document_ranges, parse_split
from retro_mcore.data.tokens.token_file import TokenFile
from retro_mcore.errors import ConfigurationError, CorruptFileError, TokenizerError
from retro_mcore.project import ProjectConfig, ProjectPaths
from retro_mcore.samples import index_cache
from retro_mcore.samples.index_cache import IndexCache
from retro_mcore.samples.project_samples import build_all_gpt_samples, remove_truncated_cache
from retro_mcore.samples.retro_dataset import build_retro_datasets
from tests.unit.data.projects import built_project


@pytest.fixture(scope="module")
def project():
    return ProjectPaths(built_project())


@pytest.fixture(scope="module")
def samples(project):
    return build_all_gpt_samples(ProjectConfig.load(project.root), project)


@pytest.fixture(scope="module")
def datasets(project):
    return build_retro_datasets(project.root, num_neighbors=2, num_retrieved_chunks=2)


def test_documents_kept_apart_lose_the_neighbors_of_mixed_chunks(project, datasets):
    from retro_mcore.samples.retro_dataset import note_of_mixed_chunks

    apart = build_retro_datasets(project.root, documents={"reset_attention_mask": True})["train"]
    assert note_of_mixed_chunks(datasets["train"]) is None
    length, mixed = apart.chunk_length, []
    for index in range(len(apart)):
        item = apart[index]
        assert np.array_equal(item["text"], datasets["train"][index]["text"])
        chunks = item["segments"].reshape(-1, length)
        mixed += (chunks != chunks[:, :1]).any(axis=1).tolist()
    assert 0 < sum(mixed) < len(mixed)
    expected = f"{np.mean(mixed):.1%} of the chunks (in {len(apart)} samples)"
    assert note_of_mixed_chunks(apart).startswith(expected)


def test_tokens_are_read_as_megatron_reads_them(project):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = project.data / "corpus_text_document"
    theirs, ours = IndexedDataset(str(prefix)), TokenFile(prefix)
    assert len(ours) == len(theirs) == ours.num_documents == 20
    for document in range(20):
        assert ours.sequence(document).tolist() == theirs[document].tolist()
    assert pickle.loads(pickle.dumps(ours)).sequence(3).tolist() == theirs[3].tolist()


def test_truncated_tokens_are_named(project, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copy(project.data / f"corpus_text_document{suffix}", tmp_path / f"x{suffix}")
    (tmp_path / "x.bin").write_bytes((tmp_path / "x.bin").read_bytes()[:-2])
    with pytest.raises(CorruptFileError, match=r"x\.bin: \d+ bytes, not \d+"):
        TokenFile(tmp_path / "x")
    (tmp_path / "x.idx").write_bytes(b"something else")
    with pytest.raises(CorruptFileError, match=r"x\.idx: not a Megatron index"):
        TokenFile(tmp_path / "x")


def test_a_token_too_large_for_its_type_is_refused(tmp_path):
    assert token_dtype(65_000) is np.uint16
    assert token_dtype(70_000) is np.int32
    document = np.array([1, 70_000])
    with pytest.raises(TokenizerError, match="token id 70000 is too large for uint16"):
        write_indexed_dataset(tmp_path / "a.bin", tmp_path / "a.idx", [document], np.uint16)


def test_the_directory_name_hashes_upstreams_description(project, samples):
    """The description as docs/data_formats.md gives it, written out."""
    config = ProjectConfig.load(project.root)
    description = {
        "class": "BlendedDataset",
        "datasets": [
            {
                "class": "MultiSplitGPTDataset",
                "dataset_path": str(project.data / "corpus_text_document"),
                "num_samples": 9,  # ceil(8 * 1.005)
                "index_split": "train",
                "random_seed": 1234,
                "sequence_length": 64,
                "split": "60,20,20",
                "split_matrix": [[0, 0.6], [0.6, 0.8], [0.8, 1.0]],
                "tokenizer": {
                    "class": "_GPTSentencePieceTokenizer",
                    "tokenizer_path": [str(project.tokenizer / "sentencepiece.model")],
                    "vocab_extra_ids": "0",
                },
                "split_preprocessing": "60,20,20",
            }
        ],
        "split": "train",
        "weights": [1.0],
        "size": 8,
    }
    digest = hashlib.md5(json.dumps(description, indent=4).encode()).hexdigest()
    assert samples["train"].description_hash == digest
    assert config.retro_neighbor_dirs["train"] == f"train_{digest}"


def test_samples_keep_to_the_documents_of_their_split(samples):
    ranges = document_ranges("60,20,20", 20)
    assert ranges == {"train": (0, 12), "valid": (12, 16), "test": (16, 20)}
    for split, size in (("train", 8), ("valid", 2), ("test", 2)):
        assert len(samples[split]) == size
        start, end = ranges[split]
        for index in range(size):
            assert samples[split].tokens(index).shape == (65,)
            documents = samples[split].document_ids(index)
            assert ((documents >= start) & (documents < end)).all()


@pytest.mark.parametrize("split", ["90,5", "a,b,c", "50,20,20", "0,50,50", "110,-5,-5"])
def test_a_split_must_be_percentages(split):
    with pytest.raises(ConfigurationError, match="--split"):
        parse_split(split)


def test_a_split_without_documents_is_refused():
    with pytest.raises(ConfigurationError, match="leaves no valid documents of the 3 in corpus"):
        check_documents("90,5,5", 3, "corpus")
    with pytest.raises(ConfigurationError, match="leaves no train documents of the 1"):
        check_documents("90,5,5", 1, "corpus")
    check_documents("100,0,0", 1, "corpus")


def test_a_sample_holds_its_neighbors_and_continuations(datasets, samples):
    for split, dataset in datasets.items():
        assert len(dataset) == len(samples[split])
        for index in range(len(dataset)):
            item = dataset[index]
            chunks, tokens = item["neighbor_chunks"], item["neighbor_tokens"]
            mask = item["neighbor_mask"]
            assert item["text"].tolist() == samples[split].tokens(index).tolist()
            assert chunks.shape == (4, 2, 2)
            assert tokens.shape == mask.shape == (4, 2, 32)
            assert (tokens.dtype, mask.dtype) == (np.int64, bool)
            own = set(samples[split].document_ids(index).tolist())
            for (place), chunk in np.ndenumerate(chunks):
                where = (*place[:2], slice(place[2] * 16, place[2] * 16 + 16))
                expected = [] if chunk == NO_NEIGHBOR else dataset.database.tokens([chunk])[0]
                kept = tokens[where][~mask[where]]
                assert kept.tolist() == list(expected)
                assert (tokens[where][mask[where]] == dataset.eod).all()
                if chunk != NO_NEIGHBOR:
                    assert int(dataset.database.documents(np.array(chunk))[1]) not in own


def test_workers_give_the_same_samples(datasets):
    dataset = datasets["train"]
    again = pickle.loads(pickle.dumps(dataset))
    loader = DataLoader(dataset, batch_size=None, num_workers=2)
    for index, item in enumerate(loader):
        other = again[index]
        for key, value in other.items():
            assert np.array_equal(np.asarray(item[key]), value)
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_no_file_is_opened_for_a_sample(datasets, monkeypatch):
    dataset, opened = datasets["train"], []
    monkeypatch.setattr(h5py, "File", None)  # it opens without Python's knowing
    sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
    with open(__file__):  # noqa: PTH123
        assert __file__ in opened  # the hook works
    opened.clear()
    for i in range(len(dataset)):
        dataset[i]
    assert not opened


def test_a_moved_project_is_read(project, datasets, tmp_path):
    shutil.copytree(project.root, tmp_path / "moved")
    moved = build_retro_datasets(tmp_path / "moved")
    for split, dataset in datasets.items():
        for key, value in dataset[1].items():
            assert np.array_equal(moved[split][1][key], value)


def test_more_neighbors_than_saved_and_missing_files_are_refused(project, tmp_path):
    with pytest.raises(ConfigurationError, match=r"num_neighbors: 6, but 5 were saved"):
        build_retro_datasets(project.root, num_neighbors=6)
    copy = tmp_path / "project"
    shutil.copytree(project.root, copy)
    name = ProjectConfig.load(copy).retro_neighbor_dirs["train"]
    files = sorted((copy / "query" / name).glob("*.hdf5"))
    files[-1].unlink()
    with pytest.raises(CorruptFileError, match="holds neighbors of 20 chunks, the samples have 32"):
        build_retro_datasets(copy)


def test_sample_indexes_that_a_killed_run_left_are_removed(tmp_path):
    paths = ProjectPaths(tmp_path)
    paths.data_cache.mkdir(parents=True)
    names = ["whole.npy", "cut.npy", "header.npy", "empty.npy"]
    for name in names:
        np.save(paths.data_cache / name, np.arange(100))
    for name, length in (("cut.npy", 500), ("header.npy", 20), ("empty.npy", 0)):
        path = paths.data_cache / name
        path.write_bytes(path.read_bytes()[:length])
    assert [path.name for path in remove_truncated_cache(paths)] == sorted(names[1:])
    assert [path.name for path in paths.data_cache.iterdir()] == ["whole.npy"]


def test_megatron_does_not_warn_of_one_dataset(caplog):
    paths = ProjectPaths(built_project())
    with caplog.at_level("WARNING"):
        build_all_gpt_samples(ProjectConfig.load(paths.root), paths)
    assert "BlendedDataset" not in caplog.text
    logger = logging.getLogger("megatron.core.datasets.blended_dataset")
    assert not logger.filters


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: bytes(len(data))])
def test_damaged_sample_indexes_are_built_again(project, samples, tmp_path, capsys, damage):
    """A disk that lost a block: zeros there would be samples, of the first document alone."""
    copy = ProjectPaths(shutil.copytree(project.root, tmp_path / "project"))
    shutil.rmtree(copy.data_cache)  # other tests add the samples of other settings
    build_all_gpt_samples(ProjectConfig.load(copy.root), copy)
    files = sorted(copy.data_cache.glob("*.npy"))
    assert len(files) == 9
    kept = {file: file.read_bytes() for file in files}
    for file in files:
        file.write_bytes(damage(kept[file]))
    again = build_all_gpt_samples(ProjectConfig.load(copy.root), copy)
    assert "damaged sample indexes" in capsys.readouterr().err
    assert again["train"].tokens(3).tolist() == samples["train"].tokens(3).tolist()
    assert {file: file.read_bytes() for file in files} == kept


def test_sample_indexes_that_cannot_be_kept_are_held_in_memory(project, samples, tmp_path, capsys):
    """A project on a disk that only an administrator writes to."""
    copy = ProjectPaths(shutil.copytree(project.root, tmp_path / "project"))
    shutil.rmtree(copy.data_cache)
    copy.data_cache.write_text("no directory can be made here")
    again = build_all_gpt_samples(ProjectConfig.load(copy.root), copy)
    assert capsys.readouterr().err.count("not kept in") == 1
    for split, part in samples.items():
        for index in range(len(part)):
            assert again[split].tokens(index).tolist() == part.tokens(index).tolist()


def test_a_project_at_another_path_reads_the_sample_indexes_it_has(project, tmp_path):
    copy = shutil.copytree(project.root, tmp_path / "project")
    (tmp_path / "link").symlink_to(copy)
    files = {path.name for path in (copy / "data" / "cache").iterdir()}
    for path in (copy, tmp_path / "link", tmp_path / "link" / ".." / "project"):
        build_all_gpt_samples(ProjectConfig.load(path), ProjectPaths(path))
    assert {path.name for path in (copy / "data" / "cache").iterdir()} == files


def test_other_tokens_of_the_same_name_do_not_take_over_the_sample_indexes(project, tmp_path):
    paths = ProjectPaths(shutil.copytree(project.root, tmp_path / "project"))
    prefix = paths.data / "corpus_text_document"
    documents = [np.full(40 + i, i) for i in range(20)]
    write_indexed_dataset(
        prefix.with_suffix(".bin"), prefix.with_suffix(".idx"), documents, np.uint16
    )
    for marker in paths.data.glob("*.done"):  # as another writer leaves them
        marker.unlink()
    samples = build_all_gpt_samples(ProjectConfig.load(paths.root), paths)["train"]
    for index in range(len(samples)):
        tokens, _, numbers = samples.read(index)
        assert set(tokens.tolist()) <= set(numbers.tolist())


def test_an_order_is_told_from_another(project, samples):
    other = build_all_gpt_samples(
        dataclasses.replace(ProjectConfig.load(project.root), retro_gpt_train_samples=80), project
    )
    train = samples["train"]
    assert train.order_digest(8) == train.order_digest(8) != train.order_digest(7)
    prefixes_agree = all(
        train.tokens(index).tolist() == other["train"].tokens(index).tolist() for index in range(8)
    )
    assert (train.order_digest(8) == other["train"].order_digest(8)) == prefixes_agree


def test_more_samples_than_memory_holds_are_refused_at_once(project):
    config = dataclasses.replace(ProjectConfig.load(project.root), retro_gpt_train_samples=10**12)
    with pytest.raises(ConfigurationError, match=r"retro_gpt_train_samples: .* TiB"):
        build_all_gpt_samples(config, project)


def test_damaged_sample_indexes_on_a_full_disk_are_taken_by_no_rank(tmp_path, monkeypatch):
    """Else the ranks would train on different samples without a word."""
    built = (np.arange(9),)
    IndexCache(tmp_path, {}).arrays("name", ["part"], lambda: built)
    (path,) = tmp_path.glob("*.npy")
    path.write_bytes(bytes(path.stat().st_size))

    def refused(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(index_cache, "signed_write", refused)
    for rank in (0, 1):
        monkeypatch.setattr(index_cache, "get_rank", lambda rank=rank: rank)
        assert IndexCache(tmp_path, {}).arrays("name", ["part"], lambda: built) is built
