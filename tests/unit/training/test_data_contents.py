"""A run goes on with the data that it was trained on, wherever it lies, and with no other.

A corpus that was exchanged behind its name was trained on without a word; more samples in
config.json put others in the place of those to come, many of them trained on already.
"""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from retro_mcore.checkpoint.arguments import read_arguments
from retro_mcore.checkpoint.files import find_checkpoint
from retro_mcore.cli import convert_checkpoint
from retro_mcore.cli.pretrain_retro import PretrainRetroOptions, pretrain_retro
from retro_mcore.cli.query_neighbors import QueryNeighborsOptions, query_neighbors
from retro_mcore.data.tokens.indexed_dataset import write_indexed_dataset
from retro_mcore.errors import ProjectError, RetroError, TokenizerError
from retro_mcore.project.lock import directory_lock
from retro_mcore.training.loop.sample_reader import check_document_tokens
from retro_mcore.training.setup.data_contents import DataContents, DatasetContents, quick_digest
from tests.unit.data.projects import blended_project


def train(project, save, **changes):
    values = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "retro_decoder_layers": [2],
        "retro_encoder_num_layers": 1,
        "position_embedding_type": "rope",
        "micro_batch_size": 2,
        "lr": 1e-3,
        "lr_decay_samples": 16,  # whatever the project's number of samples
        "num_workers": 0,
        "device": "cpu",
    }
    options = {**values, "project_dir": str(project), "save": str(save), **changes}
    return pretrain_retro(PretrainRetroOptions(**options))


@pytest.fixture(scope="module")
def begun(tmp_path_factory, megatron):
    """A run of which 4 of 8 iterations are done."""
    save = tmp_path_factory.mktemp("begun")
    train(blended_project(), save, exit_interval=4)
    return save


@pytest.fixture
def resume(begun, tmp_path):
    def resumed(project):
        save = shutil.copytree(begun, tmp_path / "save")
        return train(project, save, load=str(save))

    return resumed


@pytest.fixture
def project(tmp_path):
    return shutil.copytree(blended_project(), tmp_path / "project")


def configure(project, **changes):
    values = json.loads((project / "config.json").read_text())
    (project / "config.json").write_text(json.dumps({**values, **changes}))


def test_a_moved_project_is_trained_on(resume, project):
    assert resume(project).iteration == 8


def test_another_corpus_of_the_same_name_is_refused(resume, project):
    documents = [np.full(60, number) for number in range(12)]
    prefix = project / "data" / "b_text_document"
    for marker in prefix.parent.glob("b_*.done"):
        marker.unlink()  # with them, the files would be damaged ones
    write_indexed_dataset(
        prefix.with_suffix(".bin"), prefix.with_suffix(".idx"), documents, np.uint16
    )
    for marker in prefix.parent.glob("b_text_document.*.done"):  # as another writer leaves them
        marker.unlink()
    with pytest.raises(RetroError, match=r"was trained on another b_text_document\.bin"):
        resume(project)


def test_other_weights_are_refused(resume, project):
    path = ["0.25", "a_text_document", "0.75", "b_text_document"]
    configure(project, retro_gpt_data_path=path)
    with pytest.raises(RetroError, match=r"a_text_document by 0\.5, and now by 0\.25"):
        resume(project)


def test_all_that_differs_is_told_at_once(begun, tmp_path):
    """Whoever restarts a run from memory would otherwise mend one flag per start."""
    save = shutil.copytree(begun, tmp_path / "save")
    with pytest.raises(RetroError) as caught:
        train(blended_project(), save, load=str(save), hidden_size=64, lr=1e-4, load_gpt=None)
    assert "hidden_size 32, and now it is 64; with lr 0.001, and now it is" in str(caught.value)
    assert "Give --hidden-size, --lr as before" in str(caught.value)


def test_another_number_of_samples_that_reorders_them_is_refused(resume, project):
    configure(project, retro_gpt_train_samples=160)
    shutil.rmtree(project / "query")
    (project / "stages" / "query_neighbors.json").unlink()
    configure(project, retro_neighbor_dirs={})
    query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=5))
    with pytest.raises(RetroError, match="was trained on 8 samples, which are different ones"):
        resume(project)


def contents(*datasets, name_matters=False):
    made = [
        DatasetContents(name, weight, dict(files), name_matters) for name, weight, files in datasets
    ]
    return DataContents(tuple(made))


A, B = ("a", 0.5, {"a.bin": "1", "a.idx": "2"}), ("b", 0.5, {"b.bin": "3", "b.idx": "4"})


@pytest.mark.parametrize(
    ("now", "named"),
    [
        (contents(A, B), None),
        (contents(("c", 0.5, {"c.bin": "1", "c.idx": "2"}), B), None),
        (contents(("c", *A[1:]), B, name_matters=True), "c under the name a"),
        (contents(B, A), r"another b\.bin"),
        (contents(A), "the datasets a, b, and now they are a"),
        (contents(A, ("b", 0.5, {**B[2], "b.idx": "5"})), r"another b\.idx"),
        (contents(A, ("b", 0.5, {"b.bin": "3"})), "another b"),
        (contents(("a", 0.4, A[2]), B), "a by 0.5, and now by 0.4"),
    ],
)
def test_contents_are_compared_by_what_decides_the_samples(now, named, tmp_path):
    found = [str(error) for error in now.differences(contents(A, B).record(), tmp_path)]
    if named is None:
        assert found == []
    else:
        assert re.search(named, found[0])


def test_a_digest_sees_size_and_bytes_wherever_they_differ(tmp_path):
    file = tmp_path / "x"
    digests = set()
    for data in (b"", b"a", b"aa", b"a" * 100_000, b"a" * 99_999 + b"b", b"a" * 100_001):
        file.write_bytes(data)
        digests.add(quick_digest(file))
    assert len(digests) == 6


def test_a_second_training_into_one_save_is_refused_and_deletes_nothing(begun, tmp_path):
    save = shutil.copytree(begun, tmp_path / "save")
    half = save / "iter_0000006.tmp"
    half.mkdir()
    with directory_lock(save, "pretrain_retro"):
        with pytest.raises(ProjectError, match="another run works on it: pretrain_retro"):
            train(blended_project(), save, load=str(save))
        assert half.is_dir()
    train(blended_project(), save, load=str(save))
    assert not half.exists()


def test_a_split_that_repeats_its_documents_is_told(tmp_path, capsys, begun):
    """Two held-out documents gave a loss that looked like any other."""
    project = shutil.copytree(blended_project(), tmp_path / "project")
    configure(project, retro_gpt_eval_iters=200)
    for name in ("valid", "test"):
        shutil.rmtree(next((project / "query").glob(f"{name}_*")))
    (project / "stages" / "query_neighbors.json").unlink()
    configure(project, retro_neighbor_dirs={})
    shutil.rmtree(project / "query")
    query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=5))
    capsys.readouterr()
    train(project, tmp_path / "save", train_iters=1, skip_train=False, no_retrieval=True)
    told = capsys.readouterr()
    assert told.out.count("valid samples") == 2  # at the start, and in the summary
    lines = (tmp_path / "save" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    passes = {r["split"]: r["passes_per_evaluation"] for r in records if r["kind"] == "data"}
    assert passes["valid"] > 1


def with_settings(project, **changes):
    """The project as another choice of special tokens would have made it, but for its tokens."""
    values = json.loads((project / "retro_mcore.json").read_text())
    (project / "retro_mcore.json").write_text(json.dumps({**values, **changes}))


def uses_of_a_model(project, begun, tmp_path):
    """What takes a trained model to a project of the same tokenizer: evaluation, and training."""
    from retro_mcore.session import load_model

    save = str(tmp_path / "other")
    yield lambda: load_model(project, begun)
    yield lambda: train(project, save, load=str(begun), finetune=True, train_iters=1)


def test_a_project_of_another_eod_is_refused(begun, project, tmp_path):
    """The tokenizer's files are the same: nothing else tells a text's end from a stranger."""
    with_settings(project, eod_id=300)
    for use in uses_of_a_model(project, begun, tmp_path):
        with pytest.raises(TokenizerError, match=r"end with token 300, .* --eod-token \d+"):
            use()


def test_a_project_of_another_habit_of_bos_is_told(begun, project, tmp_path, capsys):
    with_settings(project, bos_id=301, add_bos=True)
    for use in uses_of_a_model(project, begun, tmp_path):
        use()
        told = capsys.readouterr()
        assert "begin with BOS (301), those that the model was trained on began without" in (
            told.out + told.err
        )


def test_an_older_checkpoint_does_not_say_how_documents_end():
    here = {"eod": 0, "bos": None}
    for saved in ({}, {"document_tokens": None}, {"document_tokens": here}):
        assert check_document_tokens(saved, here, "project") is None


def test_a_converted_model_keeps_how_documents_begin_and_end(begun, project, tmp_path, capsys):
    """There and back, and from a project where the checkpoint does not say."""
    expected = read_arguments(find_checkpoint(begun))["document_tokens"]
    convert = ["--load", str(begun), "--retro-origin", "mcore-0.15"]
    steps = [[*convert, "--target", "megatron", "--save", str(tmp_path / "1")]]
    steps += [["--load", str(tmp_path / "1"), "--project-dir", str(project), "--save"]]
    steps[-1] += [str(tmp_path / "2")]
    for step in steps:
        assert convert_checkpoint.main(step) == 0, capsys.readouterr().err
    assert read_arguments(find_checkpoint(tmp_path / "2"))["document_tokens"] == expected
