"""Numbers as files write them, and errors that name what the user wrote, all of them at once.

Whoever copies values from a config.json meets 500000.0; whoever writes a command meets the errors.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

from retro_mcore.cli.flags import parse_options
from retro_mcore.cli.pretrain_retro import PretrainRetroOptions, main
from retro_mcore.errors import ConfigurationError, SeveralErrors
from retro_mcore.evaluation.perplexity_config import EvaluatePerplexityConfig
from retro_mcore.evaluation.qa_config import EvaluateQaConfig
from retro_mcore.server.config import ServerConfig
from tests.unit.data.projects import built_project


@dataclass
class Options:
    """Of every kind that a number is written for."""

    count: int = 1
    """Whole."""
    maybe: int | None = None
    """Whole or none."""
    several: list[int] | None = None
    """Whole numbers."""
    rate: float = 0.5
    """Any number."""
    name: str = ""
    """Text."""


@pytest.mark.parametrize("written", ["500000", "500000.0", "5e5", "5.0E+5", "+500000."])
def test_a_whole_number_may_be_written_with_a_point(written, tmp_path):
    flags = [
        "--count",
        written,
        f"--maybe={written}",
        "--several",
        written,
        "2.0",
        "--name",
        written,
    ]
    assert parse_options(Options, flags) == Options(500_000, 500_000, [500_000, 2], name=written)
    file = tmp_path / "options.yaml"
    file.write_text(
        f"count: {written}\nmaybe: {written}\nseveral: [{written}, 2.0]\nrate: {written}\n"
    )
    options = parse_options(Options, ["--config", str(file)])
    assert options == Options(500_000, 500_000, [500_000, 2], 500_000.0)


@pytest.mark.parametrize(
    "written", ["1.5", "nan", "inf", "1e999999999", "1e-999999999", "0x10", "5e-1", ""]
)
def test_any_other_number_is_refused_with_its_flag(written, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_options(Options, ["--count", written])
    assert caught.value.code == 2
    assert "--count" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "window", "layers"),
    [
        (["--window-size", "127,0"], 128, None),
        (["--window_size=(127, 0)", "--window-attn-skip-freq", "6"], 128, [6]),
        (["--window-size", "127", "0", "--window-attn-skip-freq", "([1]*2+[0]*1)*2"], 128,
         [1, 1, 0, 1, 1, 0]),
        (["--window-size", "-1,0"], None, None),
        (["--sliding-window", "128", "--window-attn-skip-freq", "1", "0"], 128, [1, 0]),
    ],
)  # fmt: skip
def test_windows_as_megatron_spells_them(given, window, layers):
    sizes = ["--num-layers", "6", "--hidden-size", "32", "--num-attention-heads", "4"]
    run = ["--project-dir", "p", "--micro-batch-size", "1", "--lr", "1e-3"]
    options = parse_options(PretrainRetroOptions, [*sizes, *run, *given])
    assert (options.sliding_window, options.window_attn_skip_freq) == (window, layers)


@pytest.mark.parametrize(
    "given",
    [["--window-size", "127,1"], ["--window-size", "x"], ["--window-attn-skip-freq", "[1]**2"],
     ["--window-attn-skip-freq", "[print(1)]"]],
)  # fmt: skip
def test_windows_in_another_form_are_refused(given):
    with pytest.raises(ConfigurationError, match=given[0]):
        parse_options(PretrainRetroOptions, given)


@pytest.mark.parametrize("text", ["count: [1", "- 1", "1: 2", "\x00", "a: &b [*b]"])
def test_a_file_that_is_no_mapping_is_one_line(tmp_path, text):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        parse_options(Options, ["--config", str(file)])
    assert "\n" not in str(caught.value)


def test_a_switch_turned_off_wins_over_the_file(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(
        "swiglu: true\nnum_layers: 6\nhidden_size: 32\nnum_attention_heads: 4\nlr: 1e-3\n"
    )
    flags = ["--config", str(file), "--project-dir", "p", "--micro-batch-size", "1"]
    assert parse_options(PretrainRetroOptions, flags).swiglu
    assert not parse_options(PretrainRetroOptions, [*flags, "--no-swiglu"]).swiglu


def test_every_whole_number_of_the_trainer_is_read_so():
    base = {"project_dir": "p", "lr": "1", "num_layers": "1", "hidden_size": "1",
            "num_attention_heads": "1", "micro_batch_size": "1"}  # fmt: skip
    whole = [f.name for f in fields(PretrainRetroOptions) if str(f.type) in ("int", "int | None")]
    assert len(whole) > 40
    values = {**base, **dict.fromkeys(whole, "64.0")}
    flags = [
        part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)
    ]
    options = parse_options(PretrainRetroOptions, flags)
    assert all(getattr(options, name) == 64 for name in whole)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--num-layers", "2"], "--num-layers: 2 layers give no layer"),
        (["--num-layers", "2"], "or set --retro-decoder-layers"),
        (["--retro-decoder-layers", "9"], "--retro-decoder-layers: [9] in a model of 6 layers"),
        (["--retro-decoder-layers", "9"], "from 1 to --num-layers"),
        (["--retro-encoder-hidden-size", "15"], "--retro-encoder-hidden-size: 15 over 4"),
        (["--retro-mup-base-kv-channels", "8"], "8 without --retro-mup-base-hidden-size"),
        (["--num-attention-heads", "5"], "--num-attention-heads: 5 does not divide"),
        (["--num-query-groups", "3"], "--num-query-groups: 3 does not divide"),
        (["--retro-encoder-num-layers", "0"], "--retro-encoder-num-layers: 0"),
    ],
)
def test_errors_name_the_flags(megatron, capsys, flags, told):
    base = ["--project-dir", str(built_project()), "--hidden-size", "32", "--lr", "1e-3",
            "--micro-batch-size", "1"]  # fmt: skip
    sizes = {"--num-layers": "6", "--num-attention-heads": "4"}
    given = [part for flag, size in sizes.items() if flag not in flags for part in (flag, size)]
    assert main([*base, *given, *flags, "--dry-run"]) == 2
    shown = capsys.readouterr().err
    assert told in shown
    assert " num_layers" not in shown


def test_contradictions_are_told_at_once(megatron, capsys):
    flags = ["--project-dir", str(built_project()), "--hidden-size", "32", "--lr", "1e-3",
             "--num-layers", "6", "--num-attention-heads", "4", "--micro-batch-size", "0",
             "--swiglu", "--squared-relu", "--save-interval", "5", "--seq-length", "7",
             "--train-iters", "3", "--train-samples", "4"]  # fmt: skip
    assert main([*flags, "--dry-run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    for told in ("--micro-batch-size: 0", "--squared-relu", "--save-interval", "--seq-length",
                 "--train-iters: given with --train-samples"):  # fmt: skip
        assert sum(told in line for line in lines) == 1, told
    assert len([line for line in lines if line.startswith("error: --")]) == 5


def test_the_python_configuration_names_its_fields(megatron):
    from retro_mcore.model.config import RetroConfig

    with pytest.raises(SeveralErrors) as caught:
        RetroConfig(num_layers=2, hidden_size=32, num_attention_heads=4, retro_num_neighbors=0)
    assert [problem.subject for problem in caught.value.problems] == [
        "retro_num_neighbors",
        "num_layers",
    ]


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (
            EvaluatePerplexityConfig(
                project_dir="p", load="m", micro_batch_size=0, leakage_alphas=[2.0], leakage=True
            ),
            ["--micro-batch-size: 0", "--leakage-alphas: 2.0", "--leakage: given with"],
        ),
        (
            EvaluateQaConfig(
                sample_input_file="f", output="o", num_gen=0, confidence_level=2.0, stop=[""]
            ),
            ["--num-gen: 0", "--confidence-level: 2.0", "--stop: an empty", "--load: not given"],
        ),
        (ServerConfig(port=99_999, max_tokens=0), ["--port: 99999", "--max-tokens: 0"]),
    ],
)
def test_all_impossible_options_of_a_command_are_reported_together(options, flags):
    """Whoever fixes one flag per start of a big model waits for each."""
    with pytest.raises(SeveralErrors) as caught:
        options.check()
    reported = "\n".join(map(str, caught.value.problems))
    assert [flag for flag in flags if flag not in reported] == []
