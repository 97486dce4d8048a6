"""Megatron-LM's own `pretrain()` trains Retro. megatron-core's wheels from 0.17 on contain it."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from retro_mcore.errors import CheckpointError, flag_of
from tests.forked_runs import output, start
from tests.unit.data.projects import built_project
from tests.unit.training.our_losses import command_line, our_options, our_run

SCRIPT = Path(__file__).with_name("megatron_lm_on_cpu.py")


def has_trainer() -> bool:
    try:
        return importlib.util.find_spec("megatron.training") is not None
    except ModuleNotFoundError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_trainer(), reason="this megatron-core has no megatron.training"),
]

SPEC = "--spec retro_mcore.model.specs get_retro_decoder_block_spec"
ON_CPU = """--distributed-backend gloo --use-cpu-initialization --transformer-impl local
--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-persist-layer-norm
--no-rope-fusion"""
AS_OURS = """--hidden-dropout 0 --attention-dropout 0 --position-embedding-type rope --lr 1e-2
--lr-decay-style constant --lr-decay-iters 100 --log-interval 1
--make-vocab-size-divisible-by 512 --ckpt-format torch_dist --save-interval 1"""
#: With the vocabulary of the checkpoint: it is padded to a multiple of this times the ranks.
TP2 = """--tensor-model-parallel-size 2 --sequence-parallel --make-vocab-size-divisible-by 256
--override-opt-param-scheduler"""
VIRTUAL = "--num-layers 4 --num-virtual-stages-per-pipeline-rank 2"
#: The neighbor encoder is on the second stage, with a copy of the first's embedding.
PP2 = "--pipeline-model-parallel-size 2 --override-opt-param-scheduler"
#: Learned positions, which that stage copies too, and untied output weights.
LEARNED = "--position-embedding-type learned_absolute --untie-embeddings-and-output-weights"
#: Every option of ours, with a value other than its default.
OPTIONS = """--retro-attention-gate 0.5 --retro-num-neighbors 1 --retro-num-retrieved-chunks 1
--retro-encoder-layers 3 --retro-encoder-cross-attention-dropout 0.3 --retro-encoder-hidden-size 16
--retro-encoder-num-attention-heads 2 --retro-encoder-ffn-hidden-size 24
--retro-encoder-input normed --retro-encoder-rotary-scaling --retro-cross-attention-keys previous
--retro-cross-attention-positions rotary --retro-deepnorm --retro-mup-base-hidden-size 16
--retro-mup-base-kv-channels 8 --retro-origin legacy --retro-drop-chunks 0.1
--retro-drop-neighbors 0.2 --retro-replace-neighbors 0.3 --retro-replace-tokens 0.4
--geglu --sublayer-norms both --qk-layernorm-over all_heads --parallel-residual
--embedding-multiplier 2 --residual-multiplier 3 --logits-scaling 4 --softmax-scale 0.5
--attention-softcap 6 --logit-softcap 7 --no-rope-layers 1 2 --rotary-frequencies 1 0.5
--rotary-attention-factor 1.5 --rotary-local-base 100 --rotary-local-layers 1
--sliding-window 8"""
#: Options that are trained with.
TRAINED = {
    "retro_encoder_hidden_size": 16,
    "retro_encoder_num_attention_heads": 2,
    "retro_encoder_ffn_hidden_size": 24,
    "retro_cross_attention_positions": "rotary",
    "retro_deepnorm": True,
    "retro_drop_neighbors": 0.5,
}
#: Of families such as Granite, OLMo and Phi, in a model as Megatron's Retro was.
ORIGIN = {
    "retro_origin": "mcore-0.15",
    "normalization": "RMSNorm",
    "openai_gelu": True,
    "qk_layernorm": True,
    "qk_layernorm_over": "all_heads",
    "parallel_residual": True,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
    "no_rope_layers": [2],
    "rotary_frequencies": [0.9, 0.2, 0.05, 0.01],
    "rotary_attention_factor": 1.2,
}
#: Of families such as Gemma.
FAMILY = {
    "geglu": True,
    "sublayer_norms": "both",
    "embedding_multiplier": 5.5,
    "softmax_scale": 0.2,
    "attention_softcap": 2.0,
    "logit_softcap": 3.0,
    "rotary_local_base": 100,
    "rotary_local_layers": [1],
    "sliding_window": 8,
    "window_attn_skip_freq": [1, 0],
}
#: Of them, those that learned positions allow.
SCALES = "--embedding-multiplier 5.5 --residual-multiplier 0.4 --logit-softcap 3 --logits-scaling 2"


def flags_of(options: dict[str, object]) -> str:
    return " ".join(word for n, value in options.items() for word in (flag_of(n), *words_of(value)))


def words_of(value: object) -> list[str]:
    if value is True:
        return []
    if value == FAMILY["window_attn_skip_freq"]:
        return ["[1,0]"]  # Megatron-LM's form
    return [*map(str, value)] if isinstance(value, list) else [str(value)]


def ours(**changes):
    """As `our_run`, for options that are lists."""
    return our_run.__wrapped__(**changes)


def run(name: str, flags: str, ranks: int = 1, retriever: bool = True, parse: bool = False):
    argv = command_line(*f"{ON_CPU} {AS_OURS} {flags}".split(), retriever=retriever)
    return {"name": name, "ranks": ranks, "flags": argv, "parse": parse}


@pytest.fixture(scope="module")
def trained(megatron, tmp_path_factory):
    """The folder of all runs: output by rank, checkpoints, exit codes."""
    folder, learned = tmp_path_factory.mktemp("megatron_lm"), f"{LEARNED} {SCALES}"
    runs = [
        run("retro", f"{SPEC} --train-iters 2 --save retro"),
        run("resumed", f"{SPEC} --train-iters 4 --load retro --save resumed {TP2}", ranks=2),
        run("stages", f"{SPEC} --train-iters 4 --load retro --save stages {PP2}", ranks=2),
        run("new_stages", f"--train-iters 3 --save new_stages {PP2} {learned}", ranks=2),
        run("joined", f"--train-iters 3 --load new_stages --ckpt-step 2 {TP2} {learned}", ranks=2),
        run("interleaved", f"--train-iters 2 {PP2} {VIRTUAL}", ranks=2),
        run("gpt", "--train-iters 2 --save gpt", retriever=False),
        run("parsed", f"--train-iters 2 {OPTIONS}", parse=True),
        run("options", f"--train-iters 1 {flags_of(TRAINED)}"),
        run("origin", f"--train-iters 1 {flags_of(ORIGIN)}"),
        run("family", f"--train-iters 2 --save family {flags_of(FAMILY)}"),
        run("gpt_family", f"--train-iters 2 --save gpt_family {flags_of(FAMILY)}", retriever=False),
        run("taken", f"--train-iters 4 --load family --use-checkpoint-args {TP2}", ranks=2),
        run("forgotten", f"--train-iters 4 --load family {TP2}", ranks=2),
        run(
            "from_ours",
            f"--train-iters 1 --load ours --finetune --use-checkpoint-args {TP2}",
            ranks=2,
        ),
        run("refused", "--train-iters 2 --multi-latent-attention --retro-mup-base-hidden-size 8"),
    ]
    our_run()  # builds the caches of samples, which the runs share
    ours(train_iters=1, save=str(folder / "ours"), **FAMILY)
    start(SCRIPT, runs, folder)
    return folder


def check_losses(text: str, expected: list[float], rel: float = 1e-6) -> None:
    found = [float(loss) for loss in re.findall(r"lm loss: (\S+) \| loss scale", text)]
    assert len(found) == len(expected)
    assert found[0] == pytest.approx(expected[0], rel=rel)
    if len(found) == 1:
        return
    # Some releases begin to count anew only after the second line, which then has the mean.
    either = [expected[1], (expected[0] + expected[1]) / 2]
    assert min(abs(found[1] - each) for each in either) <= rel * expected[1]


def test_losses_are_our_own_trainers(trained):
    text = output(trained, "retro")
    check_losses(text, our_run().train_losses[:2])
    ((iteration, expected),) = our_run(train_iters=2).valid_losses
    found = re.search(rf"iteration {iteration} on validation set \| lm loss value: (\S+)", text)
    # Its softmax counts the rows that pad the vocabulary; our validation leaves them out.
    assert expected < float(found[1]) < expected + 0.1


def test_a_checkpoint_is_resumed_under_tensor_and_sequence_parallelism(trained):
    # Not its validation, which in Megatron-LM goes on where the one before ended.
    # Two ranks sum in another order, and Adam's division enlarges that where gradients are small.
    check_losses(output(trained, "resumed"), our_run().train_losses[2:], rel=5e-6)


def test_a_checkpoint_is_resumed_in_a_pipeline(trained):
    check_losses(output(trained, "stages"), our_run().train_losses[2:], rel=5e-6)


def test_stages_hold_the_same_embedding(trained):
    """After two steps in a pipeline, tensor parallelism computes the same from its checkpoint."""
    *_, third = re.findall(r"lm loss: (\S+) \| loss scale", output(trained, "new_stages"))
    check_losses(output(trained, "joined"), [float(third)], rel=5e-6)


def test_virtual_stages_are_refused(trained):
    text = output(trained, "interleaved", code=2, rank=0)
    assert "--virtual-pipeline-model-parallel-size: 2. Leave out --num-virtual-stages" in text


def test_the_gpt_without_retrieval(trained):
    check_losses(output(trained, "gpt"), our_run(no_retrieval=True).train_losses[:2])


@pytest.mark.parametrize(("name", "options"), [("options", TRAINED), ("origin", ORIGIN)])
def test_options_change_the_model_as_in_our_trainer(trained, name, options):
    check_losses(output(trained, name), ours(train_iters=1, **options).train_losses)


@pytest.mark.parametrize("name", ["family", "gpt_family"])
def test_options_of_families_train_as_in_our_trainer(trained, name):
    losses = ours(train_iters=2, no_retrieval=name == "gpt_family", **FAMILY).train_losses
    check_losses(output(trained, name), losses)


def test_options_are_taken_from_a_checkpoint(trained):
    losses = ours(train_iters=4, **FAMILY).train_losses
    check_losses(output(trained, "taken"), losses[2:], rel=5e-6)


def test_options_that_differ_from_the_checkpoints_are_refused(trained):
    text = output(trained, "forgotten", code=2)
    for name, value in FAMILY.items():
        assert f"{flag_of(name)}: " in text, name
        assert f"the checkpoint to load was trained with {value}. Give" in text, name


def test_a_checkpoint_of_ours_is_gone_on_from(trained):
    load = {"load": str(trained / "ours"), "finetune": True}
    expected = ours(train_iters=1, **load, **FAMILY).train_losses
    check_losses(output(trained, "from_ours"), expected, rel=5e-6)


def test_a_script_without_a_guard_saves(trained):
    assert (trained / "retro" / "latest_checkpointed_iteration.txt").read_text() == "2"
    for iteration in (1, 2):
        assert list((trained / "retro" / f"iter_000000{iteration}").glob("*.distcp"))


def test_every_option_of_ours_reaches_the_parser(trained):
    from retro_mcore.model.options import ModelOptions
    from retro_mcore.training.options.noise import NeighborNoiseOptions
    from retro_mcore.training.provider_flags import OURS

    output(trained, "parsed")
    args = json.loads((trained / "parsed.json").read_text())
    for options in (ModelOptions, NeighborNoiseOptions):
        for field in fields(options):
            if field.name.startswith("retro_") or field.name in OURS:
                assert args[field.name] not in (None, field.default), field.name
    assert args["retro_encoder_num_layers"] == 3
    assert args["retro_cross_attention_positions"] == "rotary"
    assert args["seq_length"] == 64  # the project's, by default
    assert args["tokenizer_type"] == "NullTokenizer"


def test_every_option_of_the_model_has_a_flag(trained):
    """Ours or Megatron-LM's; `check_arguments` refuses those that would not be computed."""
    from retro_mcore.model.option_traits import model_traits
    from retro_mcore.model.options import ModelOptions

    flags = set(json.loads((trained / "parsed.flags.json").read_text()))
    for name, traits in model_traits(ModelOptions).items():
        assert flags & {*map(flag_of, (name, *traits.also))}, name


def test_refusals_are_listed_in_one_line(trained):
    text = output(trained, "refused", code=2)
    assert "error: --multi-latent-attention: given. Leave it out" in text
    assert "--retro-mup-base-hidden-size: 8. Leave it out, or use tools/pretrain_retro.py" in text
    assert "Megatron-LM would give all weights one learning rate" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("name", ["retro", "gpt", "stages", "family", "gpt_family"])
def test_perplexity_is_that_of_the_converted_checkpoint(trained, tmp_path, name):
    """The command loads by `session.load_model`, as generate, serve, evaluate_qa and lm_eval do."""
    from retro_mcore.cli.convert_checkpoint import ConvertCheckpointOptions, convert_checkpoint
    from retro_mcore.cli.evaluate_perplexity import EvaluatePerplexityOptions, evaluate_perplexity

    output(trained, name)
    project, ours = str(built_project()), str(tmp_path / "ours")
    convert_checkpoint(
        ConvertCheckpointOptions(load=str(trained / name), save=ours, project_dir=project)
    )
    read, converted = (
        evaluate_perplexity(EvaluatePerplexityOptions(project_dir=project, load=load, device="cpu"))
        for load in (str(trained / name), ours)
    )
    assert [row.loss for row in read.perplexities] == [row.loss for row in converted.perplexities]


@pytest.mark.parametrize("name", ["retro", "gpt"])
def test_the_tokenizer_is_recorded(trained, name):
    from retro_mcore.data.tokenizers.loading import load_project_tokenizer
    from retro_mcore.project import ProjectConfig, ProjectPaths
    from retro_mcore.training.loop.sample_reader import tokenizer_fingerprint
    from retro_mcore.training.setup.load_model import SavedModel

    output(trained, name)
    project, directory = ProjectConfig.load(built_project()), built_project()
    saved = SavedModel.find(trained / name)
    assert saved.arguments.tokenizer_fingerprint == tokenizer_fingerprint(project, directory)
    assert saved.arguments.tokenizer_type == project.retro_gpt_tokenizer_type
    tokenizer = load_project_tokenizer(project, ProjectPaths(directory))
    assert saved.arguments.vocab_size == tokenizer.vocab_size
    assert saved.entries["document_tokens"]["eod"] == tokenizer.eod


@pytest.mark.parametrize("name", ["family", "gpt_family"])
def test_a_checkpoint_states_the_options_of_its_model(trained, name):
    """`SavedModel` is what every command of ours loads a model by."""
    from retro_mcore.training.setup.load_model import SavedModel

    output(trained, name)
    saved = SavedModel.find(trained / name).arguments
    assert {option: getattr(saved, option) for option in FAMILY} == FAMILY
    assert not saved.swiglu
    assert not saved.openai_gelu


def test_our_trainer_goes_on_from_the_weights_alone(trained, tmp_path):
    from retro_mcore.cli.pretrain_retro import pretrain_retro

    output(trained, "retro")
    load = {"load": str(trained / "retro"), "save": str(tmp_path), "train_iters": 1}
    with pytest.raises(CheckpointError, match=r"was written by Megatron-LM or.*Add --finetune"):
        pretrain_retro(our_options(**load))
    # Megatron-LM's fused GELU is the tanh approximation.
    first = pretrain_retro(our_options(**load, finetune=True, openai_gelu=True)).train_losses[0]
    assert first < our_run().train_losses[0] - 0.1


def test_instruction_tuning_and_generation_start_from_it(trained, tmp_path):
    from retro_mcore.cli.finetune_retro import FinetuneRetroOptions, finetune_retro
    from retro_mcore.cli.generate import GenerateOptions, generate

    output(trained, "retro")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}))
    common = {"project_dir": str(built_project()), "device": "cpu"}
    tuned = finetune_retro(
        FinetuneRetroOptions(
            **common, load=str(trained / "retro"), save=str(tmp_path / "tuned"), finetune=True,
            data_path=["chats.jsonl"], data_folder=str(tmp_path), micro_batch_size=1,
            global_batch_size=1, train_iters=1, lr=1e-3, num_workers=0, eval_iters=1,
        )
    )  # fmt: skip
    assert len(tuned.train_losses) == 1
    options = GenerateOptions(**common, load=str(trained / "retro"), prompt="Hi", max_new_tokens=4)
    (text,) = generate(options)
    assert len(text.generated.tokens) > text.generated.prompt_length
