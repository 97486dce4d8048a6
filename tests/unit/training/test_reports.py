"""What a run reports: operations, utilisation, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import re
import resource
import signal
import sys

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from retro_mcore.errors import ConfigurationError, MissingDependencyError
from retro_mcore.training.reporting.metrics import MetricsFile, read_metrics
from tests.unit.training.small import NO_DROPOUT, SEQUENCE_LENGTH, small_trainer, train

pytestmark = pytest.mark.usefixtures("megatron")

SHAPES = {
    "plain": {},
    "gated, grouped": {"swiglu": True, "num_query_groups": 2, "kv_channels": 16},
    "gpt": {"no_retrieval": True},
    "experts": {
        "num_experts": 4,
        "moe_router_topk": 3,
        "moe_ffn_hidden_size": 48,
        "moe_shared_expert_intermediate_size": 32,
        "disable_bias_linear": True,
    },
    "two cross-attentions": {"num_layers": 3, "retro_decoder_layers": [2, 3]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_operations_are_those_that_pytorch_counts(shape):
    from retro_mcore.training.reporting.flops import forward_flops_per_sample

    trainer = small_trainer(**NO_DROPOUT, **SHAPES[shape])
    (chunk,) = trainer._parts.stages
    batch = next(trainer._train_batches())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        chunk.eval()(**batch.model_inputs(), labels=batch.labels)
    counted = counter.get_total_flops() / len(batch.sample_ids)
    arguments = trainer.plan.arguments
    expected = forward_flops_per_sample(chunk.config, SEQUENCE_LENGTH, arguments.padded_vocab_size)
    # Positions before the first chunk's end attend to no neighbors, and are left out there.
    assert counted == pytest.approx(expected, rel=0.01)


def test_utilisation_is_a_share_of_the_peak(tmp_path, capsys):
    train(save=str(tmp_path), device_peak_tflops=1.0)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["model_flops_utilisation"] == pytest.approx(line["tflops_per_device"])
    shown = capsys.readouterr().out
    assert re.search(r"tokens/s \d+ \| TFLOP/s per device \S+ \| MFU \S+% \| left \d:\d\d", shown)


def test_on_cpu_nobody_knows_the_peak(capsys):
    train(train_iters=2)
    assert "MFU" not in capsys.readouterr().out


def test_tensorboard_holds_each_iteration_once_after_an_interruption(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="TensorBoard, an optional package, is not installed",
    ).EventAccumulator
    flags = {"tensorboard_dir": str(tmp_path / "board"), "save": str(tmp_path / "model")}
    train(exit_interval=4, **flags)
    result = train(load=flags["save"], **flags)
    board = accumulator(flags["tensorboard_dir"])
    board.Reload()
    scalars = board.Scalars("train/loss")
    assert [point.step for point in scalars] == [1, 2, 3, 4, 5, 6]
    assert scalars[-1].value == pytest.approx(result.train_losses[-1])
    assert [point.step for point in board.Scalars("valid/loss")] == [3, 6]
    assert {"train/learning_rate", "train/grad_norm", "speed/tokens_per_second"} <= set(
        board.Tags()["scalars"]
    )


def test_weights_and_biases_works_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb, an optional package, is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(train_iters=2, save=str(tmp_path), wandb_project="retro", wandb_exp_name="small")
    (run,) = (tmp_path / "wandb").rglob("run-*.wandb")
    content = run.read_bytes()
    assert b"learning_rate" in content
    assert b"retro_num_neighbors" in content  # the configuration


@pytest.mark.parametrize(
    ("library", "flags", "message"),
    [
        ("tensorboard", {"tensorboard_dir": "board"}, "--tensorboard-dir: tensorboard is not"),
        ("wandb", {"wandb_project": "p", "wandb_exp_name": "e"}, "--wandb-project: wandb is not"),
    ],
)
def test_a_missing_library_is_named_before_training(library, flags, message, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, library, None)  # what import finds of a missing one
    with pytest.raises(MissingDependencyError, match=message):
        train(**flags)


class _FullDisk:
    """Writes fail in the middle, for a while."""

    def __init__(self, monkeypatch, failing):
        self.failing, self.write = failing, MetricsFile.write
        monkeypatch.setattr(MetricsFile, "write", lambda file, record: self(file, record))

    def __call__(self, file, record):
        if record["iteration"] in self.failing:
            raise OSError(28, "No space left on device")
        self.write(file, record)


def test_a_full_disk_costs_metrics_and_not_the_run(tmp_path, monkeypatch, capsys):
    _FullDisk(monkeypatch, {2, 3})
    result = train(save=str(tmp_path), log_interval=1)
    assert result.iteration == 6
    out = capsys.readouterr().out
    assert out.count("cannot be written (No space left on device)") == 1
    assert "lacks 3 records" in out  # iterations 2 and 3, and the validation after it
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["iteration"] for r in records if r["kind"] == "train"] == [1, 4, 5, 6]


def test_a_line_that_did_not_fit_leaves_nothing_behind(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write({"kind": "train", "iteration": 1, "loss": 1.0})
    before = file.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            file.write({"kind": "train", "iteration": 2, "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert file.path.read_bytes() == before


def test_what_is_no_record_in_metrics_is_left_out(tmp_path):
    record = {"kind": "train", "iteration": 1, "loss": 2.0}
    odd = [b"\xff\xfe", b"[1]", b'{"iteration": "x", "kind": "train"}', b'{"iteration": 3}', b"{"]
    (tmp_path / "m").write_bytes(b"\n".join([*odd, json.dumps(record).encode()]))
    assert read_metrics(tmp_path / "m") == [record]


def test_a_tensorboard_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"--tensorboard-dir .*file: cannot be written"):
        train(tensorboard_dir=str(tmp_path / "file"))
