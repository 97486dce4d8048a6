"""Run a question-answering evaluation: answer a test file, or read predictions, and score them.

Import it after `setup_device`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from retro_mcore import session
from retro_mcore.data.instruction.examples import InstructionExample, read_examples
from retro_mcore.distributed import broadcast_object, get_rank, raise_together
from retro_mcore.errors import CorpusError, flag_of
from retro_mcore.evaluation.bootstrap import Estimate, estimate_mean
from retro_mcore.evaluation.predictions import predict
from retro_mcore.evaluation.qa_config import EvaluateQaConfig
from retro_mcore.evaluation.qa_legacy import (
    LegacyScores,
    legacy_line,
    legacy_scores,
    read_predictions,
)
from retro_mcore.evaluation.qa_metrics import check_scorable
from retro_mcore.evaluation.question_answering import (
    QAOptions,
    QuestionAnswerer,
    estimate_all,
    num_without_option,
    report_of,
    score_all,
)
from retro_mcore.evaluation.results import require_writable, write_results
from retro_mcore.inference.sampling import SamplingOptions
from retro_mcore.project.lock import directory_lock
from retro_mcore.project.markers import checksum
from retro_mcore.session import LoadedModel

_LOG = logging.getLogger(__name__)

SCORES_FILE = "scores.json"


@dataclass(frozen=True)
class EvaluateQaResult:
    """Scores of a question answering evaluation.

    Attributes:
        scores: Scores from 0 to 1, by neighbors ("live", "passages", "none" or "predictions") and
            metric.
        difference: First of these minus the encoder off, by metric; with --ablate-retrieval.
        legacy: Scores of the retired Retro; with --legacy-scoring.
        num_questions: Number of scored questions.
        output: The JSON file.
        report: Numbers of cut prompts, passages and answers, and of answers that are empty or name
            no option; by neighbors.
    """

    scores: dict[str, dict[str, Estimate]]
    difference: dict[str, Estimate]
    legacy: dict[str, LegacyScores]
    num_questions: int
    output: Path
    report: dict[str, dict[str, int]] = field(default_factory=dict)

    def write(self, confidence_level: float) -> None:
        """Write scores.json. Call this on one rank only.

        Args:
            confidence_level: Confidence level of the intervals, to be recorded.

        Raises:
            ConfigurationError: the file cannot be written.
        """
        values = {key: value for key, value in asdict(self).items() if key != "output"}
        write_results(self.output, {**values, "confidence_level": confidence_level})


def run(config: EvaluateQaConfig) -> EvaluateQaResult:
    """Answer and score on all ranks together. Writes the predictions but not the scores.

    Raises:
        CorpusError: the test file or the predictions are malformed. Names the line or record.
        RetroError: configuration, project and checkpoint do not match; or another run answers into
            the same folder.
    """
    with raise_together():
        config.check()
        examples = _read_test_file(config)
        if get_rank() == 0:
            require_writable(Path(config.output) / SCORES_FILE)
    if config.predictions is not None:
        with raise_together():
            rows = {"predictions": _given_predictions(config, examples)}
    else:
        with directory_lock(Path(config.output), "evaluate_qa"):
            rows = _answer(config, examples)
    result: object = None
    with raise_together():
        if get_rank() == 0:
            result = _score(config, examples, rows)
    result = broadcast_object(result)
    assert isinstance(result, EvaluateQaResult)
    return result


def _read_test_file(config: EvaluateQaConfig) -> list[InstructionExample]:
    path = Path(config.sample_input_file)
    kind = config.passages if config.needs_passages else "annotated"
    found = read_examples([path], config.task_name, kind)
    examples = found[: config.num_gen]
    if config.num_gen is not None and len(found) < config.num_gen and get_rank() == 0:
        asked = f"--num-gen {config.num_gen}, but {path} has {len(found)} questions"
        _LOG.warning("%s: all are taken", asked)
    if not examples:
        raise CorpusError(path, "holds no questions", "Name a test file with questions")
    for example in examples:
        check_scorable(example)
    estimate_mean([0.0, 1.0], num_resamples=1)  # scipy is there
    return examples


def _given_predictions(
    config: EvaluateQaConfig, examples: Sequence[InstructionExample]
) -> list[dict[str, Any]]:
    predictions = read_predictions(str(config.predictions))[: config.num_gen]
    if len(predictions) != len(examples):
        raise CorpusError(
            f"--predictions {config.predictions}",
            f"holds {len(predictions)} predictions of {len(examples)} questions",
            "Give one line per question; --num-gen scores the first ones",
        )
    return [{"pred": prediction} for prediction in predictions]


def _answer(
    config: EvaluateQaConfig, examples: Sequence[InstructionExample]
) -> dict[str, list[dict[str, Any]]]:
    """Answers, by neighbors."""
    with raise_together():
        sampling = SamplingOptions(config.temperature, config.top_k, config.top_p, config.seed)
        asked = QAOptions(
            prompt_format=config.prompt_format,
            template_id=config.template_id,
            num_context_passages=config.ft_neighbours,
            reuse_top=config.reuse_top,
            max_new_tokens=config.max_new_tokens,
            sampling=sampling,
            stop=tuple(config.stop),
            two_chunks=config.two_chunks,
        )
    loaded = session.load_model(
        str(config.project_dir),
        str(config.load),
        retrieval=config.retro_neighbors == "live",
        layout=config.parallel(),
        retro_attention_gate=config.retro_attention_gate,
    )
    _warn_of_long_texts(loaded, examples, asked)
    arms = [config.retro_neighbors, *(["none"] if config.ablate_retrieval else [])]
    rows = {}
    for arm in arms:
        with raise_together():
            answerer = QuestionAnswerer(loaded, examples, asked, arm)  # type: ignore[arg-type]
        rows[arm] = predict(
            Path(config.output) / f"predictions_{arm}.jsonl",
            len(examples),
            config.micro_batch_size,
            _settings(config, asked, loaded.checkpoint, arm),
            answerer.answer,
            f"answers, {arm} neighbors",
        )
    return rows


def _warn_of_long_texts(
    loaded: LoadedModel, examples: Sequence[InstructionExample], asked: QAOptions
) -> None:
    if loaded.window <= loaded.arguments.seq_length:
        return  # no text can be longer
    with raise_together():
        answerer = QuestionAnswerer(loaded, examples, asked, "none")
        longest = max(len(answerer.prompt_tokens(example)) for example in examples)
    session.warn_beyond_training(
        loaded.arguments, longest + asked.max_new_tokens, "prompts and answers"
    )


def _settings(
    config: EvaluateQaConfig, asked: QAOptions, checkpoint: Path | None, neighbors: str
) -> dict[str, Any]:
    """Everything that the answers depend on."""
    sampling = asdict(asked.sampling)
    if asked.sampling.top_p == 0:  # greedy
        sampling["temperature"] = 0.0
    if asked.sampling.top_p == 1:
        sampling["top_p"] = 0.0  # as in earlier records
    return {
        "--sample-input-file": checksum(config.sample_input_file),
        "--num-gen": config.num_gen,
        "--task": config.task_name,
        "--passages": config.passages if config.needs_passages else None,
        "--load": None if checkpoint is None else str(checkpoint.absolute()),
        "--project-dir": str(Path(str(config.project_dir)).absolute()),
        # A different summation order may lead to a different token.
        "--tensor-model-parallel-size": config.tensor_model_parallel_size,
        "--retro-neighbors": neighbors,
        "--retro-attention-gate": None if neighbors == "none" else config.retro_attention_gate,
        **{flag_of(name): value for name, value in asdict(asked).items()},
        "--sampling": sampling,
    }


def _score(
    config: EvaluateQaConfig,
    examples: Sequence[InstructionExample],
    rows: dict[str, list[dict[str, Any]]],
) -> EvaluateQaResult:
    answers = {arm: [row["pred"] for row in listed] for arm, listed in rows.items()}
    interval = (config.confidence_level, config.num_resamples, config.seed)
    scores = {arm: score_all(texts, examples) for arm, texts in answers.items()}
    difference = {}
    if config.ablate_retrieval:
        on = scores[config.retro_neighbors]
        for name, off in scores["none"].items():
            gains = [a - b for a, b in zip(on[name], off, strict=True)]
            difference[name] = estimate_mean(gains, *interval)
    legacy = {}
    if config.legacy_scoring:
        for arm, texts in answers.items():
            lines = texts if arm == "predictions" else [legacy_line(text) for text in texts]
            legacy[arm] = legacy_scores(lines, config.sample_input_file)
    return EvaluateQaResult(
        scores={arm: estimate_all(values, *interval) for arm, values in scores.items()},
        difference=difference,
        legacy=legacy,
        num_questions=len(examples),
        output=Path(config.output) / SCORES_FILE,
        report={
            arm: report_of(rows[arm]) | {"options_not_named": num_without_option(texts, examples)}
            for arm, texts in answers.items()
        },
    )
