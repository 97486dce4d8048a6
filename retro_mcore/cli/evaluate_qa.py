"""`evaluate_qa`: answer the questions of a test file, and score the answers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from retro_mcore.cli.command import run_command
from retro_mcore.cli.qa_table import print_qa_table
from retro_mcore.data.instruction.examples import InstructionExample, PassageKind, read_examples
from retro_mcore.data.instruction.prompts import PromptFormat
from retro_mcore.distributed import broadcast_object, get_rank, initialize, raise_together
from retro_mcore.errors import ConfigurationError, CorpusError
from retro_mcore.evaluation.bootstrap import Estimate, estimate_mean
from retro_mcore.evaluation.qa_legacy import (
    LegacyScores,
    legacy_line,
    legacy_scores,
    read_predictions,
)
from retro_mcore.evaluation.qa_metrics import check_scorable
from retro_mcore.evaluation.results import require_writable, write_results
from retro_mcore.inference.sampling import SamplingOptions
from retro_mcore.platform import distributed_backend, setup_device
from retro_mcore.project.markers import checksum

if TYPE_CHECKING:
    from retro_mcore.evaluation.question_answering import QAOptions

_LOG = logging.getLogger(__name__)

SCORES_FILE = "scores.json"


@dataclass(kw_only=True)
class EvaluateQaOptions:
    """Answer the questions of a test file, and score the answers.

    A run that was stopped goes on where it was. With --predictions nothing is generated.
    """

    sample_input_file: str
    """Test file: a JSON list, or JSON lines, of questions with `answers` and passages."""
    output: str
    """Directory for predictions (JSON lines) and scores.json."""
    project_dir: str | None = None
    """Project directory: its tokenizer, database and index."""
    load: str | None = None
    """Directory of the model's checkpoints; the latest answers."""
    predictions: str | None = None
    """Score this file instead of generating: a line of text, or of JSON with `pred`, per
    question."""
    task: str | None = None
    """The dataset's name (nq, tqa, …), which decides the prompt. Default: the name of the test
    file's directory."""
    passages: PassageKind = "retrieved"
    """The test file's passages: annotated (sub-paragraphs), retrieved (ctxs), or
    bert_pretrain_corpus."""
    ft_neighbours: int = 5
    """Passages in the prompt."""
    prompt_format: PromptFormat = "reformat_prompt_retro"
    """Words of the prompt."""
    template_id: int = 0
    """Another wording, 1 to 7, of reformat_prompt."""
    retro_neighbors: Literal["live", "passages", "none"] = "none"
    """What the neighbor encoder reads. live: neighbors from the project's index. passages: the test
    file's, after those in the prompt. none: the encoder is off, as InstructRetro answers."""
    retro_attention_gate: float | None = None
    """Scale of what the model reads in its neighbors. Default: the checkpoint's; a model that was
    tuned with 0 needs 1 here to read any."""
    reuse_top: bool = False
    """The encoder's passages begin with those in the prompt."""
    ablate_retrieval: bool = False
    """Answer with --retro-neighbors and again with the encoder off, and compare."""
    num_gen: int | None = None
    """Questions to answer, from the first. Default: all."""
    max_new_tokens: int = 64
    """Longest answer."""
    stop: list[str] = field(default_factory=list)
    """An answer ends before any of these texts."""
    two_chunks: bool = False
    """The prompt is the first chunk and the answer the second, whatever their lengths, as
    InstructRetro's models were tuned."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the most likely tokens that make up this much probability; 1: from all, 0: take the
    most likely one."""
    seed: int = 1234
    """Seed of the draws (question i draws with seed + i) and of the confidence intervals."""
    micro_batch_size: int = 8
    """Questions that are answered together; an interrupted run repeats at most these."""
    legacy_scoring: bool = False
    """Also score as the retired Retro's evaluate.py does."""
    confidence_level: float = 0.95
    """Of the confidence intervals."""
    num_resamples: int = 1000
    """Resamples of the questions for the confidence intervals."""
    tensor_model_parallel_size: int = 1
    """Ranks that share one layer."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share out the layers; further ranks answer other questions."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto: CUDA where there is one, else the CPU."""
    verify: bool = False
    """Compare the checksums of all files that are read, however large; else of 8 GiB a process."""


@dataclass(frozen=True)
class EvaluateQaResult:
    """What was measured.

    Attributes:
        scores: By what the encoder read ("live", "passages", "none" or "predictions") and metric,
            from 0 to 1.
        difference: By metric: the first of these less the encoder off; with --ablate-retrieval.
        legacy: As the retired Retro scores; with --legacy-scoring.
        num_questions: Questions that were scored.
        output: The JSON file.
        report: By what the encoder read: how many prompts, passages and answers were cut, how many
            answers are empty or name no option.
    """

    scores: dict[str, dict[str, Estimate]]
    difference: dict[str, Estimate]
    legacy: dict[str, LegacyScores]
    num_questions: int
    output: Path
    report: dict[str, dict[str, int]] = field(default_factory=dict)


def evaluate_qa(options: EvaluateQaOptions) -> EvaluateQaResult:
    """Answer, score, print a table and write scores.json.

    Raises:
        CorpusError: the test file or the predictions are malformed; names the line or record.
        RetroError: options, project and checkpoint do not fit together.
    """
    setup_device(options.device)
    initialize(distributed_backend())
    with raise_together():
        _check(options)
        examples = _read_test_file(options)
        if get_rank() == 0:
            require_writable(Path(options.output) / SCORES_FILE)
    if options.predictions is not None:
        with raise_together():
            rows = {"predictions": _given_predictions(options, examples)}
    else:
        rows = _generate(options, examples)
    result: object = None
    with raise_together():
        if get_rank() == 0:
            result = _score(options, examples, rows)
            print_qa_table(
                result.num_questions,
                result.scores,
                result.difference,
                result.legacy,
                result.report,
            )
            _write(options, result)
    result = broadcast_object(result)
    assert isinstance(result, EvaluateQaResult)
    return result


def _check(options: EvaluateQaOptions) -> None:
    if options.predictions is None:
        for flag, value in (("--project-dir", options.project_dir), ("--load", options.load)):
            if value is None:
                raise ConfigurationError(flag, "not given", "Give it, or --predictions to score")
    if options.ablate_retrieval and options.retro_neighbors == "none":
        raise ConfigurationError(
            "--ablate-retrieval",
            "there is no retrieval to switch off with --retro-neighbors none",
            "Add --retro-neighbors live or passages",
        )
    if options.ablate_retrieval and options.predictions is not None:
        raise ConfigurationError("--ablate-retrieval", "given with --predictions", "Give one")
    for flag in ("num_gen", "max_new_tokens", "micro_batch_size", "num_resamples"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise ConfigurationError(f"--{flag.replace('_', '-')}", str(value), "Give at least 1")
    if options.ft_neighbours < 0:
        raise ConfigurationError("--ft-neighbours", str(options.ft_neighbours), "Give 0 or more")
    if not 0 < options.confidence_level < 1:
        raise ConfigurationError(
            "--confidence-level", str(options.confidence_level), "Give a number between 0 and 1"
        )
    if options.reuse_top and (options.predictions or options.retro_neighbors != "passages"):
        found = "given, but the encoder reads none of the test file's passages"
        raise ConfigurationError("--reuse-top", found, "Add --retro-neighbors passages")
    if "" in options.stop:
        raise ConfigurationError("--stop", "an empty text", "Give texts to stop at")


def _read_test_file(options: EvaluateQaOptions) -> list[InstructionExample]:
    path = Path(options.sample_input_file)
    task = options.task or path.absolute().parent.name
    kind = options.passages if _needs_passages(options) else "annotated"
    found = read_examples([path], task, kind)
    examples = found[: options.num_gen]
    if options.num_gen is not None and len(found) < options.num_gen and get_rank() == 0:
        asked = f"--num-gen {options.num_gen}, but {path} has {len(found)} questions"
        _LOG.warning("%s: all are taken", asked)
    if not examples:
        raise CorpusError(path, "holds no questions", "Name a test file with questions")
    for example in examples:
        check_scorable(example)
    estimate_mean([0.0, 1.0], num_resamples=1)  # scipy is there
    return examples


def _needs_passages(options: EvaluateQaOptions) -> bool:
    if options.predictions is not None:
        return False
    return options.ft_neighbours > 0 or options.retro_neighbors == "passages"


def _given_predictions(
    options: EvaluateQaOptions, examples: Sequence[InstructionExample]
) -> list[dict[str, Any]]:
    predictions = read_predictions(str(options.predictions))[: options.num_gen]
    if len(predictions) != len(examples):
        raise CorpusError(
            f"--predictions {options.predictions}",
            f"holds {len(predictions)} predictions of {len(examples)} questions",
            "Give one line per question; --num-gen scores the first ones",
        )
    return [{"pred": prediction} for prediction in predictions]


def _generate(
    options: EvaluateQaOptions, examples: Sequence[InstructionExample]
) -> dict[str, list[dict[str, Any]]]:
    """Predictions by what the encoder reads."""
    from retro_mcore.checkpoint.files import find_checkpoint
    from retro_mcore.evaluation.predictions import predict
    from retro_mcore.evaluation.question_answering import QAOptions, QuestionAnswerer
    from retro_mcore.session import LoadedModel, warn_beyond_training

    with raise_together():
        sampling = SamplingOptions(options.temperature, options.top_k, options.top_p, options.seed)
        asked = QAOptions(
            options.prompt_format,
            options.template_id,
            options.ft_neighbours,
            options.reuse_top,
            options.max_new_tokens,
            sampling,
            tuple(options.stop),
            options.two_chunks,
        )
        checkpoint = find_checkpoint(str(options.load))
    loaded = LoadedModel.load(
        str(options.project_dir),
        str(options.load),
        options.retro_neighbors == "live",
        options.tensor_model_parallel_size,
        options.pipeline_model_parallel_size,
        options.device,
        options.retro_attention_gate,
    )
    if loaded.window > loaded.arguments.seq_length:  # else no prompt can be longer
        with raise_together():
            answerer = QuestionAnswerer(loaded, examples, asked, "none")
            longest = max(len(answerer.prompt_tokens(example)) for example in examples)
        warn_beyond_training(
            loaded.arguments, longest + options.max_new_tokens, "prompts and answers"
        )
    arms = [options.retro_neighbors, *(["none"] if options.ablate_retrieval else [])]
    rows = {}
    for arm in arms:
        with raise_together():
            answerer = QuestionAnswerer(loaded, examples, asked, arm)  # type: ignore[arg-type]
        rows[arm] = predict(
            Path(options.output) / f"predictions_{arm}.jsonl",
            len(examples),
            options.micro_batch_size,
            _settings(options, asked, checkpoint, arm),
            answerer.answer,
            f"answers, {arm} neighbors",
        )
    return rows


def _settings(
    options: EvaluateQaOptions, asked: QAOptions, checkpoint: Path, neighbors: str
) -> dict[str, Any]:
    """What the answers depend on."""
    sampling = asdict(asked.sampling)
    if asked.sampling.top_p == 0:  # greedy
        sampling["temperature"] = 0.0
    if asked.sampling.top_p == 1:
        sampling["top_p"] = 0.0  # as it has always been recorded
    return {
        "--sample-input-file": checksum(options.sample_input_file),
        "--num-gen": options.num_gen,
        "--task": options.task or Path(options.sample_input_file).absolute().parent.name,
        "--passages": options.passages if _needs_passages(options) else None,
        "--load": str(checkpoint.absolute()),
        "--project-dir": str(Path(str(options.project_dir)).absolute()),
        # Sums in another order may choose another token.
        "--tensor-model-parallel-size": options.tensor_model_parallel_size,
        "--retro-neighbors": neighbors,
        "--retro-attention-gate": None if neighbors == "none" else options.retro_attention_gate,
        **{f"--{name.replace('_', '-')}": value for name, value in asdict(asked).items()},
        "--sampling": sampling,
    }


def _score(
    options: EvaluateQaOptions,
    examples: Sequence[InstructionExample],
    rows: dict[str, list[dict[str, Any]]],
) -> EvaluateQaResult:
    from retro_mcore.evaluation.question_answering import (
        estimate_all,
        num_without_option,
        report_of,
        score_all,
    )

    answers = {arm: [row["pred"] for row in listed] for arm, listed in rows.items()}
    interval = (options.confidence_level, options.num_resamples, options.seed)
    scores = {arm: score_all(texts, examples) for arm, texts in answers.items()}
    difference = {}
    if options.ablate_retrieval:
        on = scores[options.retro_neighbors]
        for name, off in scores["none"].items():
            gains = [a - b for a, b in zip(on[name], off, strict=True)]
            difference[name] = estimate_mean(gains, *interval)
    legacy = {}
    if options.legacy_scoring:
        for arm, texts in answers.items():
            lines = texts if arm == "predictions" else [legacy_line(text) for text in texts]
            legacy[arm] = legacy_scores(lines, options.sample_input_file)
    return EvaluateQaResult(
        scores={arm: estimate_all(values, *interval) for arm, values in scores.items()},
        difference=difference,
        legacy=legacy,
        num_questions=len(examples),
        output=Path(options.output) / SCORES_FILE,
        report={
            arm: report_of(rows[arm]) | {"options_not_named": num_without_option(texts, examples)}
            for arm, texts in answers.items()
        },
    )


def _write(options: EvaluateQaOptions, result: EvaluateQaResult) -> None:
    values = {key: value for key, value in asdict(result).items() if key != "output"}
    write_results(result.output, {**values, "confidence_level": options.confidence_level})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(EvaluateQaOptions, evaluate_qa, argv)


if __name__ == "__main__":
    sys.exit(main())
