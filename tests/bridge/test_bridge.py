"""Megatron-Bridge trains Retro (`make test-bridge`)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retro_mcore.errors import CheckpointError
from tests.bridge.marks import MARKS
from tests.forked_runs import output, start
from tests.unit.data.projects import built_project
from tests.unit.data.test_tokenizer_of_model import save_tokenizer
from tests.unit.training.our_losses import our_options, our_run

SCRIPT = Path(__file__).with_name("bridge_on_cpu.py")


pytestmark = MARKS

MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "position_embedding_type": "rope",
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "make_vocab_size_divisible_by": 512,
    "lr": 1e-2,
}
RETRO = {
    "retro_decoder_layers": [2],
    "retro_encoder_hidden_dropout": 0.0,
    "retro_encoder_attention_dropout": 0.0,
}
OTHER_KEYS = {"retro_cross_attention_keys": "own"}
CHANGED = {
    "model.hidden_size": 64,
    "model.hidden_dropout": 0.5,
    "model.window_size": [31, 0],
    "model.gated_linear_unit": True,
    "model.rotary_base": 500,
}
#: With the vocabulary of the checkpoint: it is padded to a multiple of this times the ranks.
TP2 = {
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "make_vocab_size_divisible_by": 256,
}
#: The neighbor encoder is on the second stage, with a copy of the first's embedding.
PP2 = {"pipeline_model_parallel_size": 2}
#: Learned positions, which that stage copies too, and untied output weights.
LEARNED = {
    "position_embedding_type": "learned_absolute",
    "untie_embeddings_and_output_weights": True,
}
NEW = {**RETRO, **LEARNED}
UNEVEN = {**RETRO, "num_layers": 3, "decoder_first_pipeline_num_layers": 1}
DISTRIBUTED = {
    "ddp.use_distributed_optimizer": True,
    "optimizer.use_distributed_optimizer": True,
}
CP2 = {"context_parallel_size": 2}
EXPERT = {"model.expert_model_parallel_size": 2}
UNEQUAL = {"dist.eval_context_parallel_size": 1}
VIRTUAL = {"model.virtual_pipeline_model_parallel_size": 2}


def run(
    name: str,
    train_iters: int,
    ranks: int = 1,
    changes: dict | None = None,
    model: dict | None = None,
    **recipe,
):
    model = MODEL if model is None else model
    recipe = {"project_dir": str(built_project()), **model, **recipe}
    changes = {"train.train_iters": train_iters, **(changes or {})}
    return {"name": name, "ranks": ranks, "recipe": recipe, "changes": changes}


def saved_for_transformers(folder: Path) -> Path:
    """Our trainer's checkpoint of 4 iterations, written for transformers."""
    from retro_mcore.cli.convert_checkpoint import ConvertCheckpointOptions, convert_checkpoint

    our_run(save=str(folder / "ours"))
    convert_checkpoint(
        ConvertCheckpointOptions(
            load=str(folder / "ours"),
            save=str(folder / "transformers"),
            target="huggingface",
            project_dir=str(built_project()),
        )
    )
    generation = {"eos_token_id": [7, 5]}
    (folder / "transformers" / "generation_config.json").write_text(json.dumps(generation))
    # Bridge copies a tokenizer. Any: transformers has none of the project's kind.
    save_tokenizer(folder / "transformers")
    other = shutil.copytree(folder / "transformers", folder / "other")
    config = json.loads((other / "config.json").read_text())
    config["document_tokens"]["bos"] = config["bos_token_id"] = 3
    config["hidden_dropout"] = 0.5
    (other / "config.json").write_text(json.dumps(config))
    return folder / "transformers"


def in_bf16_without_tokenizer(directory: Path) -> Path:
    """A copy of a directory for transformers."""
    copy = directory.with_name("bf16")
    copy.mkdir()
    config = json.loads((directory / "config.json").read_text()) | {"dtype": "bfloat16"}
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def trained(megatron, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bridge")
    resume = {"checkpoint.load": "retro"}
    load = {**resume, "checkpoint.save": "resumed"}
    from_context = {"checkpoint.load": "context"}
    each = {"checkpoint.save_interval": 1}
    third = {"checkpoint.load": "new stages", "checkpoint.ckpt_step": 2}
    start_from = {"huggingface": str(saved_for_transformers(folder)), "lr": 1e-2}
    other = {"huggingface": str(folder / "other"), "lr": 1e-2, "hidden_dropout": 0.0}
    both = {"checkpoint.also_save_hf_checkpoint": True, "checkpoint.hf_trust_remote_code": True}
    bf16 = {"huggingface": str(in_bf16_without_tokenizer(folder / "transformers")), "lr": 1e-2}
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text('{"model_type": "llama"}')
    runs = [
        run("from transformers", 2, changes=both, model=start_from, save="from transformers"),
        run(
            "from transformers, 2",
            2,
            ranks=2,
            model={**start_from, "tensor_model_parallel_size": 2},
        ),
        run(
            "in bf16",
            2,
            ranks=2,
            changes=both,
            model={**other, "tensor_model_parallel_size": 2, "mixed_precision": "bf16_mixed"},
            save="in bf16",
        ),
        run("unlike", 2, model={**start_from, "num_layers": 3}),
        run("export refused", 2, changes=both, model=bf16, save="export refused"),
        run("nowhere", 2, model={"huggingface": "nowhere"}),
        run("another kind", 2, model={"huggingface": str(folder / "llama")}),
        run("for our trainer", 2, num_experts=4, retro_mup_base_hidden_size=16, **RETRO),
        run("retro", 2, save="retro", **RETRO),
        run("resumed", 4, ranks=2, changes=load, save="resumed", **RETRO, **TP2),
        run("other keys", 4, ranks=2, changes=resume, **OTHER_KEYS, **RETRO, **TP2),
        run("stages", 4, ranks=2, changes=resume, **RETRO, **PP2),
        run("new stages", 3, ranks=2, changes=each, save="new stages", **NEW, **PP2),
        run("joined", 3, ranks=2, changes=third, **NEW, **TP2),
        run(
            "stages refused", 2, ranks=2, changes=both, model={**start_from, **PP2}, save="refused"
        ),
        run(
            "uneven", 1, ranks=2, changes=DISTRIBUTED, mixed_precision="bf16_mixed", **UNEVEN, **PP2
        ),
        run("context", 3, ranks=2, save="context", **RETRO, **CP2),
        run("from context", 4, ranks=2, changes=from_context, **RETRO, **TP2),
        run("from context, in stages", 4, ranks=4, changes=from_context, **RETRO, **PP2, **CP2),
        run("context, gpt", 2, ranks=2, no_retrieval=True, **CP2),
        run("whole validation", 2, ranks=2, changes=UNEQUAL, **RETRO, **CP2),
        run("long pieces", 2, ranks=2, **RETRO, context_parallel_size=3),
        run("divided experts", 2, ranks=2, changes=EXPERT, **RETRO),
        run("virtual", 1, ranks=2, changes=VIRTUAL, **RETRO, **PP2),
        run("gpt", 2, save="gpt", no_retrieval=True),
        run("refused", 2, changes=CHANGED, **RETRO),
    ]
    our_run()  # builds the caches of samples, which the runs share
    start(SCRIPT, runs, folder)
    return folder


def losses(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"lm loss: (\S+) \| loss scale", text)]


def test_losses_are_our_own_trainers(trained):
    text = output(trained, "retro")
    assert losses(text) == pytest.approx(our_run().train_losses[:2], rel=1e-6)
    ((iteration, expected),) = our_run(train_iters=2).valid_losses
    found = re.search(rf"iteration {iteration} on validation set \| lm loss value: (\S+)", text)
    # Its softmax counts the rows that pad the vocabulary; our validation leaves them out.
    assert expected < float(found[1]) < expected + 0.1


def test_a_checkpoint_is_resumed_under_tensor_and_sequence_parallelism(trained):
    found = losses(output(trained, "resumed"))
    # Not its validation, which goes on where the one before ended.
    assert found == pytest.approx(our_run().train_losses[2:], rel=1e-6)


def test_a_checkpoint_is_resumed_in_a_pipeline(trained):
    found = losses(output(trained, "stages"))
    assert found == pytest.approx(our_run().train_losses[2:], rel=5e-6)


def test_stages_hold_the_same_embedding(trained):
    """After two steps in a pipeline, tensor parallelism computes the same from its checkpoint."""
    *_, third = losses(output(trained, "new stages"))
    assert losses(output(trained, "joined")) == pytest.approx([third], rel=5e-6)


def test_uneven_stages_in_bf16_with_the_distributed_optimizer(trained):
    (loss,) = losses(output(trained, "uneven"))
    assert loss == pytest.approx(our_run().train_losses[0], rel=0.02)  # of random weights


def test_context_parallelism(trained):
    found = losses(output(trained, "context"))
    assert found == pytest.approx(our_run().train_losses[:3], rel=1e-6)
    found = losses(output(trained, "context, gpt"))
    assert found == pytest.approx(our_run(no_retrieval=True).train_losses[:2], rel=1e-6)


@pytest.mark.parametrize("name", ["from context", "from context, in stages"])
def test_its_checkpoint_is_resumed_in_another_layout(trained, name):
    (last,) = losses(output(trained, name))
    assert last == pytest.approx(our_run().train_losses[3], rel=5e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("whole validation", "dist.eval_context_parallel_size: 1, and training divides samples"),
        ("long pieces", "error: context_parallel_size: 3, for samples of"),
        ("divided experts", "model.expert_model_parallel_size: 2 in Megatron-Bridge"),
    ],
)
def test_other_divisions_are_refused(trained, name, message):
    assert message in output(trained, name, code=2, rank=0)


def test_virtual_stages_are_refused(trained):
    text = output(trained, "virtual", code=2, rank=0)
    assert "model.virtual_pipeline_model_parallel_size: 2 in Megatron-Bridge" in text


def test_conversion_in_a_pipeline_is_refused(trained):
    text = output(trained, "stages refused", code=2, rank=0)
    assert "error: model.pipeline_model_parallel_size: 2, for a model that starts from" in text


def test_the_gpt_without_retrieval(trained):
    found = losses(output(trained, "gpt"))
    assert found == pytest.approx(our_run(no_retrieval=True).train_losses[:2], rel=1e-6)


def test_changes_that_a_checkpoint_would_not_record_are_refused(trained):
    text = output(trained, "refused", code=2)
    assert "model.hidden_size: 64, and the model was made with 32" in text
    assert "model.hidden_dropout: 0.5, and the model was made with 0.0" in text
    assert "model.window_size: [31, 0], and the model was made with None" in text
    assert "model.gated_linear_unit: True, and the model was made with False" in text
    assert "model.rotary_base: 500, and the model was made with 10000" in text


@pytest.mark.parametrize("name", ["retro", "gpt"])
def test_our_commands_read_its_checkpoints(trained, tmp_path, name):
    from retro_mcore.cli.convert_checkpoint import ConvertCheckpointOptions, convert_checkpoint
    from retro_mcore.cli.evaluate_perplexity import EvaluatePerplexityOptions, evaluate_perplexity

    output(trained, name)
    project, ours = str(built_project()), str(tmp_path / "ours")
    convert_checkpoint(ConvertCheckpointOptions(load=str(trained / name), save=ours))
    read, converted = (
        evaluate_perplexity(EvaluatePerplexityOptions(project_dir=project, load=load, device="cpu"))
        for load in (str(trained / name), ours)
    )
    assert [row.loss for row in read.perplexities] == [row.loss for row in converted.perplexities]


def test_our_trainer_goes_on_from_the_weights_alone(trained, tmp_path):
    from retro_mcore.cli.pretrain_retro import pretrain_retro

    output(trained, "retro")
    load = {"load": str(trained / "retro"), "save": str(tmp_path), "train_iters": 1}
    with pytest.raises(CheckpointError, match=r"or Megatron-Bridge.*Add --finetune"):
        pretrain_retro(our_options(**load))
    first = pretrain_retro(our_options(**load, finetune=True)).train_losses[0]
    assert first < our_run().train_losses[0] - 0.1


@pytest.mark.parametrize("name", ["from transformers", "from transformers, 2"])
def test_a_run_starts_from_a_directory_of_transformers(trained, tmp_path, name):
    """As our trainer does from the checkpoint that the directory was made of."""
    from retro_mcore.cli.pretrain_retro import pretrain_retro

    found = losses(output(trained, name))
    options = our_options(load=str(trained / "ours"), finetune=True, train_iters=2)
    # The second loss is that of weights after a step; the sums of two ranks are others.
    assert found == pytest.approx(pretrain_retro(options).train_losses, rel=1e-6)


@pytest.mark.parametrize("name", ["from transformers", "in bf16"])
def test_its_checkpoint_is_written_for_transformers_by_bridge_and_by_our_command(
    trained, tmp_path, name
):
    """The same tensors, bit for bit, and the same options; Bridge keeps the directory's dtype."""
    from retro_mcore.cli.convert_checkpoint import ConvertCheckpointOptions, convert_checkpoint

    output(trained, name)
    save, options = trained / name, {"target": "huggingface"}
    convert_checkpoint(
        ConvertCheckpointOptions(load=str(save), save=str(tmp_path / "hf"), **options)
    )
    wanted = load_file(tmp_path / "hf" / "model.safetensors")
    found = load_file(max(save.rglob("model.safetensors")))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor.float()) for key, tensor in wanted.items())
    trained_in = {tensor.dtype for tensor in wanted.values()}
    assert trained_in == {torch.bfloat16 if name == "in bf16" else torch.float32}
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert {7, 5} <= set(generation["eos_token_id"])
    before = load_file(trained / "transformers" / "model.safetensors")
    assert not torch.equal(found["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    directory = max(save.rglob("model.safetensors")).parent
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    configs = [
        json.loads((each / "config.json").read_text()) for each in (directory, tmp_path / "hf")
    ]
    assert configs[0] == {**configs[1], "dtype": "float32"}
    code, ours = (
        {file.name for file in each.glob("*_retro.py")} for each in (directory, tmp_path / "hf")
    )
    assert code == ours


def test_documents_that_begin_otherwise_are_told_once(trained):
    assert "begin" not in output(trained, "in bf16")
    assert (trained / "in bf16.0.txt").read_text().count("began with BOS (3)") == 1


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        (
            "unlike",
            [
                "was trained with num_layers 2, and now it is 3. Give num_layers as before, or "
                "choose another huggingface and save"
            ],
        ),
        (
            "export refused",
            ["has no tokenizer that", "says bfloat16, in which", "weights of float32"],
        ),
        (
            "other keys",
            [
                "was trained with retro_cross_attention_keys mixed, and now it is own. Give "
                "retro_cross_attention_keys as before, or choose another checkpoint.load"
            ],
        ),
        ("nowhere", ["nowhere: is no directory"]),
        ("another kind", ["llama: holds no RetroForCausalLM"]),
        ("for our trainer", ["num_experts: 4 in Meg", "retro_mup_base_hidden_size: 16 in Meg"]),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_is_built(trained, name, messages):
    output(trained, name, code=2)
    text = (trained / f"{name}.0.txt").read_text()  # the first rank says why
    assert all(message in text for message in messages), text
    assert not (trained / name).exists()
