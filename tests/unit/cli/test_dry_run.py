"""Every example, tried dry."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

from retro_mcore.cli.flags import parse_options
from retro_mcore.cli.pretrain_retro import PretrainRetroOptions, main, pretrain_retro
from retro_mcore.cli.tables.training import drops_attention
from retro_mcore.errors import ConfigurationError
from retro_mcore.training.loop.resume import FINISHED_FILE
from tests.processes import START_METHOD
from tests.unit.data.projects import built_project

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted(
    path.relative_to(ROOT)
    for folder in ("pretrain", "retrofit")
    for path in (ROOT / "examples" / folder).glob("*.yaml")
)
#: Parameters as InstructRetro published them: GPT, and with retrieval.
PUBLISHED = {
    "843m": (823e6, 878e6),
    "2b": (2.25e9, 2.5e9),
    "8b": (8.5e9, 9.5e9),
    "48b": (43e9, 48e9),
}
#: Learning rates, batch and steps of continued pretraining, likewise.
CONTINUED = {
    "843m": (2e-5, 2e-6, 128, 195_200),
    "2b": (2e-5, 2e-6, 256, 97_600),
    "8b": (1e-5, 1e-6, 512, 48_800),
    "48b": (9e-6, 9e-7, 768, 32_500),
}


def options_of(example, *flags):
    return parse_options(PretrainRetroOptions, ["--config", str(ROOT / example), *flags])


def test_there_are_examples_of_every_size():
    assert len(EXAMPLES) == 8


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_every_example_runs_dry(example, megatron):
    run = pretrain_retro(options_of(example, "--dry-run"))
    gpt, retro = PUBLISHED[example.stem]
    count = run.parameters
    assert count.total == pytest.approx(retro, rel=0.015)
    assert count.total - count.retrieval == pytest.approx(gpt, rel=0.01)
    assert 0 < run.memory.total < 80e9
    # Six operations a parameter and token of the decoder, the embedding's lookup apart; and more.
    assert run.flops_per_token > 6 * (gpt - 256_000 * run.plan.arguments.hidden_size)


@pytest.mark.parametrize("size", CONTINUED)
def test_continued_pretraining_is_the_published_one(size, megatron):
    run = pretrain_retro(options_of(f"examples/retrofit/{size}.yaml", "--dry-run"))
    options = run.plan.options
    assert (options.lr, options.min_lr) == CONTINUED[size][:2]
    assert (run.plan.global_batch_size, run.plan.train_iters) == CONTINUED[size][2:]
    assert (options.adam_beta1, options.adam_beta2) == (0.9, 0.95)
    assert run.plan.sequence_length == 4096


def test_slurm_script_runs_dry():
    script = ROOT / "examples" / "slurm" / "pretrain.sbatch"
    run = subprocess.run(
        ["bash", str(script), "examples/pretrain/843m.yaml", "--dry-run"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    for row in ("877,518,848", "memory per GPU", "FLOPs per token"):
        assert row in run.stdout


@pytest.mark.parametrize(
    ("text", "flags", "code"),
    [
        ("save: {0}\nload: '{0}'  # same\n", [], 0),
        ("", ["--save", "{0}", "--load={0}"], 0),
        ("save: other\nload: other\n", ["--save={0}", "--load", "{0}"], 0),
        ("", [], 2),
        ("save: {0}\n", [], 2),
        ("load: {0}\nsave: {0}\n", ["--save", "other"], 2),
    ],
)
def test_slurm_script_requeues_a_run_that_saved(tmp_path, text, flags, code):
    config, run, tools = tmp_path / "c.yaml", tmp_path / "run", tmp_path / "tools"
    config.write_text(text.format(run))
    tools.mkdir()
    run.mkdir()
    tracker = run / "latest_checkpointed_iteration.txt"
    commands = {"srun": f"echo 5 > {tracker}", "scontrol": "echo $*", "python": "exit 1"}
    for name, body in commands.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    script = ROOT / "examples" / "slurm" / "pretrain.sbatch"
    done = subprocess.run(
        ["bash", str(script), str(config), *(flag.format(run) for flag in flags)],
        env={"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": "python", "SLURM_JOB_ID": "7",
             "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert ("requeue 7" in done.stdout) == (code == 0)
    assert ("error: save and load" in done.stderr) == (code == 2)


@pytest.mark.parametrize(
    ("before", "saved", "finished", "requeued"),
    [
        (None, 5, None, True),
        (None, 5, 5, False),  # at the moment of the signal it had just ended
        (5, 5, 5, False),
        (5, 9, 5, True),  # its iterations were raised since
        (5, 5, None, False),
        (None, None, None, False),
    ],
)
def test_slurm_script_does_not_requeue_a_run_that_is_finished(
    tmp_path, before, saved, finished, requeued
):
    """torchrun ends with 1 after a signal, whether or not its processes had finished."""
    config, run, tools = tmp_path / "c.yaml", tmp_path / "run", tmp_path / "tools"
    config.write_text(f"save: {run}\nload: {run}\n")
    tools.mkdir()
    run.mkdir()
    tracker, last = run / "latest_checkpointed_iteration.txt", run / FINISHED_FILE
    if before is not None:
        tracker.write_text(str(before))
    srun = "" if saved is None else f"echo {saved} > {tracker}\n"
    srun += "" if finished is None else f"echo {finished} > {last}\n"
    commands = {"srun": srun + "exit 1", "scontrol": "echo $*", "python": "exit 1"}
    for name, body in commands.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "slurm" / "pretrain.sbatch"), str(config)],
        env={"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": "python", "SLURM_JOB_ID": "7",
             "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert ("requeue 7" in done.stdout) == requeued
    at_its_end = finished is not None and finished == saved
    assert done.returncode == (0 if requeued or at_its_end else 1), done.stderr


def test_a_project_says_what_it_fixes(megatron, capsys):
    flags = ["--project-dir", str(built_project()), "--num-layers", "6", "--hidden-size", "32",
             "--num-attention-heads", "4", "--lr", "1e-3", "--micro-batch-size", "1"]  # fmt: skip
    assert main([*flags, "--dry-run"]) == 0
    assert "2 samples = 2 x 1 x 1; 128 tokens" in capsys.readouterr().out
    assert main([*flags, "--dry-run", "--world-size", "2"]) == 0
    assert "2 samples = 1 x 1 x 2" in capsys.readouterr().out
    assert main([*flags, "--vocab-size", "7"]) == 2
    assert "--vocab-size: 7, but it is" in capsys.readouterr().err
    assert main([*flags, "--world-size", "8"]) == 2
    assert "--world-size: 8, but it is 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--world-size", "6"], "--world-size: 6, and one copy of the model takes 4"),
        (["--world-size", "12"], "--global-batch-size: 512 over 3 copies"),
    ],
)
def test_layouts_that_do_not_divide_are_refused(megatron, flags, message):
    with pytest.raises(ConfigurationError, match=message):
        pretrain_retro(options_of("examples/pretrain/8b.yaml", "--dry-run", *flags))


SMALL = ["--project-dir", "none", "--num-layers", "6", "--hidden-size", "32", "--lr", "1e-3",
         "--num-attention-heads", "4", "--seq-length", "256", "--global-batch-size", "4",
         "--train-samples", "8", "--vocab-size", "96", "--micro-batch-size", "1"]  # fmt: skip
CUT = ["--context-parallel-size", "2", "--no-rope-fusion"]


@pytest.fixture
def with_engine(monkeypatch, megatron):
    """As if Transformer Engine were installed, which a dry run does not import."""
    from retro_mcore.training.setup import model_config

    find = model_config.importlib.util.find_spec
    monkeypatch.setattr(
        model_config.importlib.util,
        "find_spec",
        lambda name, *package: name == "transformer_engine" or find(name, *package),
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sliding-window", "64", *CUT], "--context-parallel-size: 2 with .*--transformer-impl"),
        (["--reset-attention-mask"], "--reset-attention-mask: given, but Transformer Engine"),
    ],
)
def test_a_dry_run_refuses_layers_that_the_run_refuses(with_engine, flags, message):
    plan = [*SMALL, *flags, "--dry-run"]
    with pytest.raises(ConfigurationError, match=message):
        pretrain_retro(parse_options(PretrainRetroOptions, [*plan, "--device", "cuda"]))
    for other in (["--device", "cpu"], ["--device", "cuda", "--transformer-impl", "local"]):
        pretrain_retro(parse_options(PretrainRetroOptions, [*plan, *other]))


def test_a_dry_run_plans_with_the_engine_of_its_device(with_engine):
    engine = ["--transformer-impl", "transformer_engine", "--cp-comm-type", "p2p"]
    flags = [*SMALL, *CUT, *engine, "--position-embedding-type", "rope", "--dry-run"]
    pretrain_retro(parse_options(PretrainRetroOptions, [*flags, "--device", "cuda"]))
    with pytest.raises(ConfigurationError, match="--transformer-impl: transformer_engine, which"):
        pretrain_retro(parse_options(PretrainRetroOptions, [*flags, "--device", "cpu"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizer", "muon"], "emerging_optimizers is missing.*pip install"),
        (["--optimizer", "sgd", "--retro-mup-base-hidden-size", "16"], "those of Adam"),
    ],
)
def test_a_dry_run_refuses_optimizers_that_the_run_refuses(megatron, monkeypatch, flags, message):
    from retro_mcore.platform import other_optimizers

    monkeypatch.setattr(other_optimizers, "_has_package", lambda: False)
    with pytest.raises(ConfigurationError, match=message):
        pretrain_retro(parse_options(PretrainRetroOptions, [*SMALL, *flags, "--dry-run"]))


def test_layers_of_transformer_engine_are_not_simulated(with_engine):
    flags = [*SMALL, "--no-rope-fusion", "--dry-run", "--simulate", "--device", "cuda"]
    with pytest.raises(ConfigurationError, match="--simulate: with Transformer Engine's layers"):
        pretrain_retro(parse_options(PretrainRetroOptions, flags))


def test_a_simulated_step_is_printed_and_written(tmp_path):
    flags = ["--project-dir", str(tmp_path), "--num-layers", "4", "--hidden-size", "32",
             "--num-attention-heads", "4", "--retro-decoder-layers", "2", "4", "--lr", "1e-3",
             "--micro-batch-size", "1", "--seq-length", "128", "--global-batch-size", "24",
             "--train-samples", "240", "--vocab-size", "500", "--world-size", "8",
             "--pipeline-model-parallel-size", "2", "--tensor-model-parallel-size", "2",
             "--sequence-parallel", "--num-experts", "4", "--moe-layer-freq", "2",
             "--disable-bias-linear", "--expert-model-parallel-size", "2",
             "--moe-token-dispatcher-type", "alltoall",
             "--dry-run", "--simulate", "--json", str(tmp_path / "run.json")]  # fmt: skip
    with ProcessPoolExecutor(1, multiprocessing.get_context(START_METHOD)) as pool:
        code, printed = pool.submit(run_main, flags).result()
    assert code == 0
    assert "simulate with --attention-dropout 0 " in printed
    assert "Tokens are assumed to be evenly routed" in printed
    written = json.loads((tmp_path / "run.json").read_text())
    stages = written["simulation"]
    assert written["batch"]["micro_batches"] == 12
    assert len(stages) == 2
    for stage, name in zip(stages, ("stage 1", "stage 2"), strict=True):
        assert name in printed
        assert stage["peak"] == sum(stage["memory"].values()) > 0
        assert all(stage["sent"][group] > 0 for group in ("tp", "pp", "dp", "ep", "embedding"))
    # The first stage has the encoder, and so is the slower one: it never waits for long.
    assert stages[0]["waiting"] < stages[1]["waiting"]
    # Of the whole model's FLOPs: two micro batches in a row, divided by two.
    flops = sum(stage["flops"] for stage in stages) * 2 / 12
    assert flops == pytest.approx(written["flops_per_token"] * 128, rel=0.1)


@pytest.mark.parametrize(
    ("rates", "drops"),
    [({}, False), ({"attention_dropout": 0.1}, True), ({"no_retrieval": True}, False),
     ({"retro_encoder_attention_dropout": 0.1}, True),
     ({"retro_encoder_cross_attention_dropout": 0.1}, True),
     ({"retro_encoder_attention_dropout": 0.1, "no_retrieval": True}, False)],
)  # fmt: skip
def test_attention_with_dropout_is_told(rates, drops):
    none = {"attention_dropout": 0.0, "retro_encoder_attention_dropout": 0.0,
            "retro_encoder_cross_attention_dropout": None, "no_retrieval": False}  # fmt: skip
    assert drops_attention(SimpleNamespace(**{**none, **rates})) == drops


GIB, TERA = 2**30, 1e12


def published_steps():
    """The simulated steps in examples/pretrain/README.md: rows by size, one of each stage."""
    text = (ROOT / "examples/pretrain/README.md").read_text(encoding="utf-8")
    table = text[text.index("| layout |") :].split("\n\n")[0].splitlines()
    rows = {name: cells for name, *cells in map(cells_of, table)}
    columns = {"843m": [0], "2b": [1], "8b": [2], "48b": [3, 4]}
    return {
        size: [{name: cells[place] for name, cells in rows.items()} for place in places]
        for size, places in columns.items()
    }


def cells_of(line):
    return [cell.strip().replace(",", "") for cell in line.strip("|").split("|")]


def is_rounded(text, value):
    """Whether a cell is a value, rounded."""
    _, _, decimals = text.partition(".")
    return abs(float(text) - value) < 0.501 * 10.0 ** -len(decimals)


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_table_of_simulated_steps_fits_the_examples(size, megatron):
    run = pretrain_retro(options_of(f"examples/pretrain/{size}.yaml", "--dry-run"))
    options, stages = run.plan.options, published_steps()[size]
    tensor, pipeline = options.tensor_model_parallel_size, options.pipeline_model_parallel_size
    sizes = {"TP": tensor, "PP": pipeline, "DP": run.copies}
    layout = " x ".join(f"{name}{number}" for name, number in sizes.items() if number > 1)
    assert stages[0]["layout"] == layout
    largest = max(stages, key=lambda rows: float(rows["memory"]))
    for kind in ("weights", "gradients", "optimizer"):
        assert is_rounded(largest[kind], getattr(run.memory, kind) / GIB)
    # A formula per layer does not know where the peak is.
    assert run.memory.total / GIB == pytest.approx(float(largest["memory"]), rel=0.05)
    for rows in stages:
        kinds = ("weights", "gradients", "optimizer", "activations", "temporary")
        parts = sum(float(rows[kind]) for kind in kinds)
        assert float(rows["memory"]) == pytest.approx(parts, abs=0.03)
    operations = sum(float(rows["TFLOPs for a step"]) for rows in stages) * TERA
    tokens = run.plan.global_batch_size * run.plan.sequence_length / run.copies
    assert operations == pytest.approx(run.flops_per_token * tokens / tensor, rel=0.05)


@pytest.mark.slow
def test_the_estimate_is_near_a_simulated_step(tmp_path):
    """Of the smallest example; the others' layers take minutes. The table has what they took."""
    config = ["--config", str(ROOT / "examples/pretrain/843m.yaml"), "--dry-run", "--simulate"]
    with ProcessPoolExecutor(1, multiprocessing.get_context(START_METHOD)) as pool:
        code, _ = pool.submit(run_main, [*config, "--json", str(tmp_path / "run.json")]).result()
    assert code == 0
    written = json.loads((tmp_path / "run.json").read_text())
    estimate, (stage,) = written["estimated_memory"], written["simulation"]
    for kind in ("weights", "gradients", "optimizer"):  # Adam counts its steps, in a few bytes
        assert estimate[kind] == pytest.approx(stage["memory"][kind], rel=1e-5)
    # Kept and temporary memory together; a formula per layer does not know where the peak is.
    assert estimate["total"] == pytest.approx(stage["peak"], rel=0.05)
    (rows,) = published_steps()["843m"]
    for kind in ("weights", "gradients", "optimizer"):
        assert is_rounded(rows[kind], stage["memory"][kind] / GIB)
    assert is_rounded(rows["sent for a step: dp"], stage["sent"]["dp"] / GIB)
    # What operations need on the way differs between releases of PyTorch.
    assert float(rows["memory"]) == pytest.approx(stage["peak"] / GIB, rel=0.02)
    assert float(rows["TFLOPs for a step"]) == pytest.approx(stage["flops"] / TERA, rel=0.05)


def run_main(flags):
    """The command's exit code and output."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        return main(flags), printed.getvalue()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--simulate"], "--simulate: given without --dry-run"),
        (["--json", "run.json"], "--json: run.json without --dry-run"),
        (["--dry-run", "--simulate", "--cpu-offloading-num-layers", "2"],
         "--simulate: with --cpu-offloading-num-layers 2"),
        (["--dry-run", "--simulate", "--transformer-impl", "transformer_engine"],
         "--transformer-impl: transformer_engine, which is not installed"),
        (["--dry-run", "--simulate", "--fp8-format", "hybrid"], "--fp8-format: hybrid without"),
        (["--dry-run", "--simulate"], "--simulate: this process is one of 1 already"),
    ],
)  # fmt: skip
def test_what_cannot_be_simulated_is_refused(megatron, flags, message):
    with pytest.raises(ConfigurationError, match=message):
        pretrain_retro(options_of("examples/pretrain/843m.yaml", *flags))


def test_without_a_project_its_flags_are_needed(megatron, tmp_path):
    options = PretrainRetroOptions(
        project_dir=str(tmp_path / "none"), num_layers=6, hidden_size=32, num_attention_heads=4,
        lr=1e-3, micro_batch_size=1, dry_run=True,
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="--seq-length: not given"):
        pretrain_retro(options)
