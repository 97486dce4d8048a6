"""Predictions for a test file, one JSON line per question, with any number of ranks and restarts.

Questions are answered in fixed batches, and each batch is written atomically to one file. So a
killed run resumes with the missing batches, on any number of ranks. Since a batch always holds the
same questions, answers do not depend on interruptions, and the final file has the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from retro_mcore.distributed import barrier, get_rank, raise_together
from retro_mcore.errors import ConfigurationError, CorruptFileError
from retro_mcore.json_text import json_line, json_lines, parse_json
from retro_mcore.progress import track
from retro_mcore.project.atomic import atomic_write, write_json
from retro_mcore.project.config import read_json_object

#: Answers the questions with these indexes, in order. All ranks of a model call it together.
AnswerBatch = Callable[[Sequence[int]], list[dict[str, Any]]]


def predict(
    path: Path,
    num_questions: int,
    batch_size: int,
    settings: Mapping[str, Any],
    answer: AnswerBatch,
    description: str,
) -> list[dict[str, Any]]:
    """Answer every unanswered question on all ranks, and read all answers.

    Args:
        path: The file of predictions (.jsonl), ordered by question. Until it is complete, finished
            batches are in `<path>.parts`. `<path>.settings.json` records the settings.
        num_questions: Number of questions.
        batch_size: Questions per batch.
        settings: Everything that the answers depend on, as JSON.
        answer: Answers the questions of a batch.
        description: Label of the progress bar.

    Raises:
        ConfigurationError: the file was made with other settings. Names them.
        CorruptFileError: the file is damaged.
    """
    parts = path.with_name(f"{path.name}.parts")
    settings = {**settings, "batch_size": batch_size}
    with raise_together():
        if get_rank() == 0:
            _check_settings(path, settings)
    if not path.exists():
        batches = range(-(-num_questions // batch_size))
        missing = [batch for batch in batches if not _part(parts, batch).exists()]
        barrier()  # no rank writes before all ranks have checked
        first = parallel_state.get_data_parallel_rank()
        mine = missing[first :: parallel_state.get_data_parallel_world_size()]
        with raise_together():
            for batch in track(mine, description, hidden=get_rank() != 0):
                start = batch * batch_size
                places = range(start, min(start + batch_size, num_questions))
                lines = answer(places)
                with raise_together(parallel_state.get_model_parallel_group()):
                    if _is_first_of_model():
                        _write_lines(_part(parts, batch), lines)
        with raise_together():
            if get_rank() == 0:
                _join([_part(parts, batch) for batch in batches], path)
                shutil.rmtree(parts, ignore_errors=True)
    with raise_together():
        return _read(path, num_questions)


def _is_first_of_model() -> bool:
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_pipeline_model_parallel_rank() == 0
    )


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    record = path.with_name(f"{path.name}.settings.json")
    if not record.exists():
        if path.exists():
            raise ConfigurationError(
                f"--output {path.parent}",
                f"{path.name} exists, but the settings that it was made with do not",
                "Use another directory",
            )
        write_json(record, dict(settings))
        return
    before = read_json_object(record)
    # Normalized as JSON: tuples become lists.
    now = json.loads(json.dumps(dict(settings)))
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise ConfigurationError(
                "--micro-batch-size" if name == "batch_size" else name,
                f"{path} was made with {before.get(name)!r}, asked for {now.get(name)!r}",
                "Repeat the command as it was run before, or use another --output",
            )


def _part(parts: Path, batch: int) -> Path:
    return parts / f"{batch:08d}.jsonl"


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json_line(line) + "\n" for line in lines)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _join(parts: Sequence[Path], path: Path) -> None:
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())


def _read(path: Path, num_questions: int) -> list[dict[str, Any]]:
    try:
        rows = [parse_json(line, allow_nan=True) for _, line in json_lines(path.read_bytes())]
        numbers = [row["id"] for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(path, f"not predictions ({error})", "Remove it") from error
    if numbers != list(range(num_questions)):
        raise CorruptFileError(
            path, f"holds {len(numbers)} predictions of {num_questions}", "Remove it"
        )
    return rows
