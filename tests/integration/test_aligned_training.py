"""Training and evaluation on an aligned project: what counts, resumption, other samples."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from retro_mcore.chunking import padding_mask
from retro_mcore.cli.evaluate_perplexity import EvaluatePerplexityOptions, evaluate_perplexity
from retro_mcore.cli.pretrain_retro import PretrainRetroOptions, pretrain_retro
from retro_mcore.cli.set_samples import SetSamplesOptions, set_samples
from retro_mcore.errors import CheckpointError
from retro_mcore.samples.inspection import SampleInspector
from retro_mcore.samples.retro_dataset import build_retro_datasets
from tests.unit.data.aligned import M, aligned_database, save_tables
from tests.unit.data.projects import documents


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aligned")
    made = aligned_database(folder, True, documents(11, 300), eval_iters=4)
    return save_tables(made)


def train(project, **changes):
    values = {
        "project_dir": str(project),
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "retro_decoder_layers": [2],
        "retro_encoder_num_layers": 1,
        "position_embedding_type": "rope",
        "micro_batch_size": 1,
        "lr": 1e-3,
        "num_workers": 0,
        "device": "cpu",
        "retro_drop_neighbors": 0.1,
    }
    return pretrain_retro(PretrainRetroOptions(**{**values, **changes}))


def evaluate(project, load, folder, **changes):
    return evaluate_perplexity(
        EvaluatePerplexityOptions(
            project_dir=str(project),
            load=str(load),
            output=str(folder / "perplexity.json"),
            device="cpu",
            protocol="samples",
            **changes,
        )
    )


@pytest.fixture(scope="module")
def trained(project, tmp_path_factory):
    save = tmp_path_factory.mktemp("run") / "checkpoint"
    return save, train(project, save=str(save), save_interval=2)


def test_an_evaluation_counts_texts_and_their_ends_alone(project, trained, tmp_path):
    save, result = trained
    datasets = build_retro_datasets(project)
    kinds = ["real", "shuffled", "random", "none"]
    measured = evaluate(project, save, tmp_path, split="both", retro_eval_neighbors=kinds)
    for split in ("valid", "test"):
        rows = [row for row in measured.perplexities if row.split == split]
        number = rows[0].num_samples
        masks = [datasets[split][index]["loss_mask"] for index in range(number)]
        counted = sum(mask.sum() for mask in masks)
        assert 0 < counted < sum(map(len, masks))
        assert {row.num_tokens for row in rows} == {counted}
        assert rows[0].num_distinct_tokens <= counted
        assert rows[0].num_tokens == sum(part.num_tokens for part in rows[0].corpora.values())
    again = train(project, load=str(save), skip_train=True)
    first = evaluate(project, save, tmp_path, split="test").perplexities[0]
    assert again.test_loss == pytest.approx(first.loss, rel=1e-6)
    assert len(result.train_losses) == 4


def test_documents_kept_apart_are_evaluated_as_trained(project, tmp_path):
    apart = {"reset_attention_mask": True, "reset_position_ids": True}
    save = tmp_path / "checkpoint"
    train(project, save=str(save), train_iters=1, **apart)
    measured = evaluate(project, save, tmp_path, split="test").perplexities[0]
    again = train(project, load=str(save), skip_train=True, train_iters=1, **apart)
    assert again.test_loss == pytest.approx(measured.loss, rel=1e-6)
    with pytest.raises(CheckpointError, match="with reset_attention_mask True, and now it is"):
        train(project, load=str(save), skip_train=True, train_iters=1)


def test_the_log_tells_counted_tokens_from_padding(project, trained):
    save, _ = trained
    lines = map(json.loads, (save / "metrics.jsonl").read_text().splitlines())
    (speed,) = [line for line in lines if "tokens_per_second" in line]
    train_samples = build_retro_datasets(project)["train"]
    masks = [train_samples[index]["loss_mask"] for index in range(len(train_samples))]
    share = sum(mask.sum() for mask in masks) / sum(map(len, masks))
    assert speed["counted_tokens_per_second"] / speed["tokens_per_second"] == pytest.approx(share)


def test_a_resumed_run_is_the_uninterrupted_one(project, trained, tmp_path):
    save, result = trained
    copy = shutil.copytree(save, tmp_path / "checkpoint")
    (copy / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = train(project, load=str(copy), ckpt_step=2)
    assert resumed.train_losses == result.train_losses[2:]


def test_other_samples_train_without_a_search_and_do_not_resume(project, trained, tmp_path, capsys):
    save, _ = trained
    other = shutil.copytree(project, tmp_path / "project")
    set_samples(SetSamplesOptions(str(other), seq_length=6 * M, seed=5, train_samples=4))
    assert len(train(other, retro_num_neighbors=20).train_losses) == 2
    assert re.search(r"train samples: \d+ of \d+ chunks .* than 20 neigh", capsys.readouterr().out)
    set_samples(SetSamplesOptions(str(other), seq_length=4 * M, train_samples=16))
    with pytest.raises(CheckpointError):
        train(other, load=str(save))


def test_the_page_of_neighbors_shows_no_padding(project):
    inspector = SampleInspector(project, "valid", 2, 2, 3)
    measures = inspector.measure(1000, 1)
    assert len(measures.distances) == len(measures.overlaps) > 0
    shown = padding = 0
    for number in range(len(inspector.dataset)):
        text = inspector.dataset[number]["text"]
        for chunk, view in enumerate(inspector.show(number).chunks):
            tokens = text[chunk * M : (chunk + 1) * M]
            kept = tokens[~padding_mask(tokens, M, inspector.dataset.eod)]
            expected = inspector._tokenizer.detokenize(kept.tolist())
            assert "".join(piece for piece, _ in view.text) == expected
            shown, padding = shown + len(view.neighbors), padding + len(tokens) - len(kept)
    assert shown
    assert padding
