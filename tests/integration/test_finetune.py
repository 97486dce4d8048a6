"""The command `finetune_retro` on a small pretrained model: what is learned, and what is not."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from retro_mcore.cli.finetune_retro import FinetuneRetroOptions, finetune_retro, main
from retro_mcore.errors import CheckpointError, ConfigurationError, CorpusError
from tests.unit.data.projects import built_project

COLORS = ("red", "green", "blue", "black")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    from retro_mcore.cli.pretrain_retro import PretrainRetroOptions, pretrain_retro

    folder = str(tmp_path_factory.mktemp("pretrained"))
    pretrain_retro(
        PretrainRetroOptions(
            project_dir=str(built_project()),
            save=folder,
            num_layers=2,
            hidden_size=32,
            num_attention_heads=2,
            retro_decoder_layers=[2],
            retro_encoder_num_layers=1,
            position_embedding_type="rope",
            micro_batch_size=2,
            lr=1e-3,
            num_workers=0,
            device="cpu",
        )
    )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions whose answers stand in their second passage."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "nq").mkdir()
    records = [
        {
            "question": f"{number}?",
            "answers": [COLORS[number % 4]],
            "ctxs": [
                {"title": "", "text": "none"},
                {"title": "", "text": " ".join([COLORS[number % 4]] * 6)},
            ],
        }
        for number in range(32)
    ]
    for name in ("train", "dev"):
        (folder / "nq" / f"nq_QA_{name}.json").write_text(json.dumps(records))
    chats = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return folder


@pytest.fixture(scope="module")
def options(pretrained, data):
    def make(**changes):
        values = {
            "project_dir": str(built_project()),
            "load": pretrained,
            "finetune": True,
            "data_path": ["nq"],
            "data_folder": str(data),
            "passages": "retrieved",
            "prompt_format": "reformat_prompt_short",
            "ft_neighbours": 1,
            "seq_length": 64,
            "micro_batch_size": 4,
            "global_batch_size": 8,
            "train_iters": 4,
            "eval_interval": 4,
            "eval_iters": 2,
            "lr": 1e-2,
            "weight_decay": 0.1,
            "lr_decay_style": "constant",
            "num_workers": 0,
            "device": "cpu",
        }
        return FinetuneRetroOptions(**{**values, **changes})

    return make


def weights(folder):
    from retro_mcore.training.setup.load_model import load_model_from_checkpoint

    model, arguments = load_model_from_checkpoint(folder)
    return model.state_dict(), arguments


def is_retrieval(name):
    return "neighbor_encoder" in name or "cross_att" in name


def test_gate_0_trains_the_decoder_alone(options, pretrained, tmp_path):
    result = finetune_retro(options(save=str(tmp_path)))
    assert result.train_losses[-1] < result.train_losses[0]
    assert result.valid_losses
    before, _ = weights(pretrained)
    after, arguments = weights(tmp_path)
    assert arguments.retro_attention_gate == 0.0
    for name, tensor in before.items():
        if torch.is_tensor(tensor):
            assert torch.equal(tensor, after[name]) == is_retrieval(name), name


@pytest.mark.slow
def test_the_encoder_reads_the_passages_that_the_decoder_lacks(options, data, tmp_path):
    # The answer stands in the second passage alone, which the encoder gets.
    from retro_mcore.cli.evaluate_qa import EvaluateQaOptions, evaluate_qa

    settings = {"train_iters": 60, "lr": 5e-3, "micro_batch_size": 8}
    encoder = {"retro_attention_gate": 1.0, "retro_num_neighbors": 1}
    with_passages = finetune_retro(options(**encoder, **settings, save=str(tmp_path / "model")))
    without = finetune_retro(options(**settings))
    assert with_passages.valid_losses[-1][1] < 0.8 * without.valid_losses[-1][1]
    answered = evaluate_qa(
        EvaluateQaOptions(
            project_dir=str(built_project()),
            load=str(tmp_path / "model"),
            sample_input_file=str(data / "nq" / "nq_QA_dev.json"),
            output=str(tmp_path / "answers"),
            prompt_format="reformat_prompt_short",
            ft_neighbours=1,
            retro_neighbors="passages",
            ablate_retrieval=True,
            max_new_tokens=8,
            device="cpu",
        )
    )
    scores = {name: found["exact_match"].mean for name, found in answered.scores.items()}
    assert scores["passages"] > scores["none"] + 0.3, scores


@pytest.fixture(scope="module")
def tuned_with_gate_0(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gate_0")
    finetune_retro(options(save=str(folder)))
    return str(folder)


def test_the_encoder_of_a_model_tuned_with_gate_0_can_be_switched_on(tuned_with_gate_0):
    from retro_mcore.session import load_model

    tokens = torch.arange(64).unsqueeze(0)
    neighbors = torch.arange(4 * 2 * 32).view(8, 32)

    def changed_by_neighbors(gate):
        loaded = load_model(built_project(), tuned_with_gate_0, retro_attention_gate=gate)
        alone = loaded.model(tokens, tokens, None)
        return not torch.equal(
            loaded.model(tokens, tokens, None, context_input_ids=neighbors), alone
        )

    assert not changed_by_neighbors(None)
    assert changed_by_neighbors(1.0)


def generates(load, data, output, neighbors, gate):
    from retro_mcore.cli.generate import GenerateOptions, generate

    return generate(
        GenerateOptions(
            project_dir=str(built_project()),
            load=load,
            prompt="word " * 20,
            max_new_tokens=2,
            retro_neighbors="none" if neighbors == "none" else "live",
            neighbors=["given"] if neighbors == "given" else None,
            retro_attention_gate=gate,
            device="cpu",
        )
    )


def answers(load, data, output, neighbors, gate):
    from retro_mcore.cli.evaluate_qa import EvaluateQaOptions, evaluate_qa

    return evaluate_qa(
        EvaluateQaOptions(
            project_dir=str(built_project()),
            load=load,
            sample_input_file=str(data / "nq" / "nq_QA_dev.json"),
            output=str(output),
            ft_neighbours=0,
            num_gen=1,
            max_new_tokens=2,
            retro_neighbors=neighbors,
            retro_attention_gate=gate,
            device="cpu",
        )
    )


def measures(load, data, output, neighbors, gate):
    from retro_mcore.cli.evaluate_perplexity import (
        EvaluatePerplexityOptions,
        evaluate_perplexity,
    )

    return evaluate_perplexity(
        EvaluatePerplexityOptions(
            project_dir=str(built_project()),
            load=load,
            retro_eval_neighbors=[neighbors] if neighbors else [],
            retro_attention_gate=gate,
            eval_iters=1,
            output=str(output / "perplexity.json"),
            device="cpu",
        )
    ).perplexities


@pytest.mark.parametrize(
    ("command", "neighbors"),
    [(generates, "live"), (answers, "live"), (answers, "passages"), (measures, "real")],
)
def test_no_command_gives_neighbors_to_a_closed_gate_unless_it_is_opened(
    command, neighbors, tuned_with_gate_0, data, tmp_path
):
    # Whoever compares retrieval on and off would compare a model with itself, or with another.
    with pytest.raises(ConfigurationError, match="tuned with --retro-attention-gate 0"):
        command(tuned_with_gate_0, data, tmp_path, neighbors, None)
    assert command(tuned_with_gate_0, data, tmp_path, "none", None)
    assert command(tuned_with_gate_0, data, tmp_path, neighbors, 1.0)


def test_the_perplexity_of_a_closed_gate_is_measured_without_neighbors(
    tuned_with_gate_0, data, tmp_path, capsys
):
    (row,) = measures(tuned_with_gate_0, data, tmp_path, "", None)
    assert row.neighbors == "none"
    assert "reads no neighbors" in capsys.readouterr().err


@pytest.mark.parametrize("gate", [-1.0, float("nan"), float("inf")])
def test_a_gate_that_is_no_scale_is_refused(gate, tuned_with_gate_0, data, tmp_path):
    with pytest.raises(ConfigurationError, match="--retro-attention-gate"):
        generates(tuned_with_gate_0, data, tmp_path, "live", gate)


def test_a_blend_of_questions_and_packed_chats_learns(options):
    result = finetune_retro(
        options(
            data_path=["0.5", "nq", "0.5", "chats.jsonl"],
            pack_samples=True,
            seq_length=192,
            retro_attention_gate=1.0,
            prompt_format="reformat_prompt_retro",
            loss_on="answers",
        )
    )
    assert result.train_losses[-1] < result.train_losses[0]


def test_a_run_that_was_interrupted_goes_on_as_if_it_was_not(options, tmp_path, capsys):
    changes = {"hidden_dropout": 0.1, "pack_samples": True, "seq_length": 128}
    whole = finetune_retro(options(save=str(tmp_path / "whole"), **changes))
    output = "".join(capsys.readouterr())
    # The same command again: the checkpoint in --save wins over the pretrained one in --load.
    parts = [
        finetune_retro(options(save=str(tmp_path / "parts"), **changes, exit_interval=2))
        for _ in range(2)
    ]
    assert [part.iteration for part in parts] == [2, 4]
    losses = parts[0].train_losses + parts[1].train_losses
    assert losses == whole.train_losses
    again = finetune_retro(options(save=str(tmp_path / "whole"), **changes))
    assert again.reused
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    data = [record for record in map(json.loads, lines) if record["kind"] == "data"]
    assert [record["split"] for record in data] == ["train", "valid"]
    for record, samples in zip(data, (32, 16), strict=True):
        assert record["packed_samples"] == samples
        assert record["packed_tokens"] + record["padding_tokens"] == samples * 129
        assert f"{record['packed_examples']} examples packed into {samples}, " in output


def test_a_resumed_run_packs_as_before(options, tmp_path):
    run = {"save": str(tmp_path), "pack_samples": True}
    finetune_retro(options(**run, pack_open_samples=2, exit_interval=1))
    assert finetune_retro(options(**run, exit_interval=2)).iteration == 2
    for changes in ({"pack_open_samples": 3}, {"pack_open_samples": 3, "no_load_optim": True}):
        with pytest.raises(CheckpointError, match="pack_open_samples 2, and now it is 3"):
            finetune_retro(options(**run, **changes))


@pytest.mark.parametrize(("packed", "num_open"), [(True, 1), (False, None)])
def test_checkpoints_without_pack_open_samples_filled_one_sample_after_another(
    monkeypatch, options, packed, num_open
):
    from retro_mcore.training.setup import finetune_plan

    found = []
    monkeypatch.setattr(
        finetune_plan.TrainingPlan, "check_resumes", lambda self, saved, _: found.append(saved)
    )
    for resumed in ({"pack_samples": packed}, {"pack_samples": packed, "pack_open_samples": None}):
        command = finetune_plan._packing_as_before(options(pack_samples=packed), resumed)
        assert command.num_open_samples == num_open
    plan = object.__new__(finetune_plan.FinetunePlan)
    for saved in ({"pack_samples": packed}, {"pack_samples": packed, "pack_open_samples": 7}):
        plan.check_resumes(saved, None)
    assert [saved["pack_open_samples"] for saved in found] == [num_open, 7]


@pytest.mark.parametrize("command", ["pack_samples", "reset_attention_mask"])
def test_samples_are_not_kept_apart_by_transformer_engine(monkeypatch, command):
    from retro_mcore.training.setup import finetune_plan, plan

    (module, kind) = (
        (finetune_plan, finetune_plan.FinetunePlan)
        if command == "pack_samples"
        else (plan, plan.TrainingPlan)
    )
    monkeypatch.setattr(module, "uses_transformer_engine", lambda _: True)
    given = SimpleNamespace(**{command: True})
    flag = "--" + command.replace("_", "-")
    with pytest.raises(ConfigurationError, match=f"{flag}: .* Add --transformer-impl local"):
        kind.check_layers(SimpleNamespace(command=given, options=given))


def test_a_resumed_run_must_be_asked_the_same(options, tmp_path):
    finetune_retro(options(save=str(tmp_path), exit_interval=2))
    with pytest.raises(CheckpointError, match="ft_neighbours 1, and now it is 0"):
        finetune_retro(options(save=str(tmp_path), ft_neighbours=0))


def test_a_resumed_run_reads_the_same_examples_wherever_they_lie(options, data, tmp_path):
    """Who adds records to a file and goes on would train some twice and some never."""
    file = tmp_path / "chats.jsonl"
    file.write_text((data / "chats.jsonl").read_text())
    changes = {"save": str(tmp_path / "run"), "ft_neighbours": 0, "valid_data_path": ["nq"]}
    finetune_retro(options(**changes, data_path=[str(file)], exit_interval=2))
    (tmp_path / "moved").mkdir()
    moved = file.rename(tmp_path / "moved" / "chats.jsonl")
    resumed = finetune_retro(options(**changes, data_path=[str(moved)], exit_interval=3))
    assert resumed.iteration == 3
    moved.write_text(moved.read_text() + "\n" + moved.read_text())
    with pytest.raises(CheckpointError, match=r"was trained on another chats\.jsonl"):
        finetune_retro(options(**changes, data_path=[str(moved)]))


def test_what_is_cut_to_fit_is_told_for_each_dataset_and_split(options, data, tmp_path, capsys):
    """Who tunes on long articles would learn to answer from passages that are not there."""
    for folder, answer in (("a", "because " * 99), ("b", "no")):
        (tmp_path / folder).mkdir()
        record = {
            "question": "Why?",
            "longform_answer": answer,
            "ctxs": [{"title": "", "text": "x "}],
        }
        records = [
            record,
            {**record, "longform_answer": "so"},
            {"question": "Left out?", "ctxs": []},
        ]
        (tmp_path / folder / "mine.json").write_text(json.dumps(records))
    given = {
        "data_path": [
            "1",
            str(tmp_path / "a" / "mine.json"),
            "1",
            str(tmp_path / "b" / "mine.json"),
        ],
        "valid_data_path": [str(data / "chats.jsonl")],
        "longform_answer": True,
        "prompt_format": "reformat_prompt_retro",
        "save": str(tmp_path / "run"),
        "train_iters": 1,
        "eval_iters": 1,
    }
    finetune_retro(options(**given))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "data"]
    train, valid = records
    assert [train["split"], valid["split"]] == ["train", "valid"]
    first, second = train["by_dataset"].values()
    assert [str(tmp_path / name / "mine.json") for name in "ab"] == list(train["by_dataset"])
    assert (first["examples"], second["examples"], train["examples"]) == (2, 2, 4)
    assert (first["answers_cut"], second["answers_cut"], train["answers_cut"]) == (1, 0, 1)
    assert first["records_left_out"] == second["records_left_out"] == 1
    assert train["prompts_cut"] == train["questions_cut"] == 4
    assert (valid["examples"], valid["questions_cut"]) == (1, 1)
    output = "".join(capsys.readouterr())
    words = "answers cut, which do not teach to stop"
    assert output.count(f"of 2 examples of {tmp_path / 'a' / 'mine.json'}: ") == 2  # start and end
    assert output.count(words) == 2
    assert output.count("of 1 examples of chats: 1 prompts cut to fit the window") == 2


def test_experts_are_balanced_with_the_weights_given(options, tmp_path):
    from retro_mcore.cli.pretrain_retro import PretrainRetroOptions, pretrain_retro

    experts = str(tmp_path / "experts")
    pretrain_retro(
        PretrainRetroOptions(
            project_dir=str(built_project()),
            save=experts,
            no_retrieval=True,
            num_layers=1,
            hidden_size=16,
            num_attention_heads=2,
            num_experts=4,
            disable_bias_linear=True,
            moe_z_loss_coeff=0.25,
            position_embedding_type="rope",
            micro_batch_size=2,
            exit_interval=1,
            lr=1e-3,
            num_workers=0,
            device="cpu",
        )
    )
    given = {"load": experts, "train_iters": 1, "pack_samples": True, "log_interval": 1}
    found = []
    for name, changes in {"as before": {}, "given": {"moe_aux_loss_coeff": 0.5}}.items():
        save = tmp_path / name
        finetune_retro(options(save=str(save), **given, **changes))
        lines = map(json.loads, (save / "metrics.jsonl").read_text().splitlines())
        found.append(next(record for record in lines if record["kind"] == "train"))
    z_loss, both = found
    assert z_loss["loss"] == both["loss"]
    assert z_loss["grad_norm"] != both["grad_norm"]
    assert set(both) - set(z_loss) == {"load_balancing_loss"}
    assert both["z_loss"] == z_loss["z_loss"] > 0
    none = {"moe_aux_loss_coeff": 0.5, "moe_router_load_balancing_type": "none"}
    with pytest.raises(ConfigurationError, match=r"--moe-aux-loss-coeff: 0.5, with .* none"):
        finetune_retro(options(**given, **none))
    with pytest.raises(ConfigurationError, match=r"--moe-z-loss-coeff: 0.5, but .* no experts"):
        finetune_retro(options(moe_z_loss_coeff=0.5))


def test_the_pretrained_checkpoint_needs_finetune(options):
    with pytest.raises(CheckpointError, match="was trained with"):
        finetune_retro(options(finetune=False))


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"load": None}, ConfigurationError, "--load: not given"),
        ({"load_gpt": "x"}, ConfigurationError, "--load-gpt"),
        ({"keep_last_n": 2}, ConfigurationError, "--keep-last-n: given without --save"),
        ({"replication": True}, ConfigurationError, "--replication: given without"),
        ({"reuse_top": True}, ConfigurationError, "--reuse-top"),
        ({"train_iters": 0}, ConfigurationError, "--train-iters"),
        ({"moe_z_loss_coeff": -1.0}, ConfigurationError, "--moe-z-loss-coeff"),
        ({"pack_open_samples": 2}, ConfigurationError, "--pack-open-samples: 2, without packing"),
        ({"pack_samples": True, "pack_open_samples": 0}, ConfigurationError, "--pack-open-samples"),
        ({"data_path": ["nothing"]}, CorpusError, "--data-path nothing"),
        ({"seq_length": 60, "retro_attention_gate": 1.0}, ConfigurationError, "--seq-length"),
    ],
)
def test_what_cannot_work_is_refused_by_name(options, changes, error, named):
    with pytest.raises(error, match=named):
        finetune_retro(options(**changes))


def test_a_bad_record_stops_the_command_with_one_line(options, data, capsys, tmp_path, pretrained):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "q", "answer": "a", "ctxs": []}\n{"question": "q"}\n')
    arguments = f"--project-dir {built_project()} --load {pretrained} --finetune --data-path {bad}"
    arguments += " --micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1e-3"
    assert main([*arguments.split(), "--passages", "annotated", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "record 1: has no answer to learn" in line


@pytest.mark.parametrize(
    ("changes", "micro_batch_sizes"),
    [({}, (8, 1, 4)), ({"pack_samples": True, "loss_on": "everything"}, (8, 2))],
)
def test_the_micro_batch_changes_neither_loss_nor_gradient(
    options, data, tmp_path, changes, micro_batch_sizes
):
    """Answers of one word beside answers of twenty: on one GPU and on eight it is one training."""
    records = [
        {"question": f"{n}?", "answer": " ".join(["so"] * (1 + n * n % 23)), "ctxs": []}
        for n in range(32)
    ]
    (data / "uneven.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = []
    for micro_batch_size in micro_batch_sizes:
        save = tmp_path / str(micro_batch_size)
        finetune_retro(
            options(
                data_path=["uneven.jsonl"],
                valid_data_path=["uneven.jsonl"],
                micro_batch_size=micro_batch_size,
                train_iters=2,
                eval_interval=2,
                log_interval=1,
                lr=1e-3,
                save=str(save),
                **changes,
            )
        )
        lines = map(json.loads, (save / "metrics.jsonl").read_text().splitlines())
        records = [record for record in lines if record["kind"] != "data"]
        found.append([value for r in records for value in (r["loss"], r.get("grad_norm", 1.0))])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=2e-5)  # float32 sums in another order
