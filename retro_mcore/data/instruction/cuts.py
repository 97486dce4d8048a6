"""Count what instruction tuning cuts from examples to fit the sequence length, and its padding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retro_mcore.data.instruction.dataset import PACKED, InstructionDataset
from retro_mcore.data.instruction.examples import InstructionExample
from retro_mcore.data.instruction.samples import (
    FittedExample,
    InstructionFormat,
    encoder_passages,
    fit_example,
)
from retro_mcore.data.tokenizers.base import Tokenizer

#: Cuts in prompts, counted in examples (or questions), for tuning and `evaluate_qa`.
PROMPT_CUTS = {
    "prompts_cut": "prompts cut to fit the window",
    "questions_cut": "questions cut themselves",
    "encoder_passages_cut": "with passages cut for the encoder",
}
#: Keys of the counts, and how they are reported.
CUTS = {
    **PROMPT_CUTS,
    "passages_cut": "passages of prompts cut",
    "passages_dropped": "passages of prompts dropped",
    "turns_dropped": "early turns dropped",
    "answers_cut": "answers cut, which do not teach to stop",
    "answers_not_learned": "earlier answers not learned",
    "records_left_out": "records without longform_answer left out",
}
_COUNTED = ("examples", *CUTS)


@dataclass(frozen=True)
class InstructionCuts:
    """Counts of what is cut in the examples of one split, and of the padding of packed samples.

    Attributes:
        name: The split.
        by_dataset: For each dataset name, the number of distinct `examples` read, and `CUTS`.
        packing: Counts of `dataset.PACKED`; empty if samples are not packed.
    """

    name: str
    by_dataset: Mapping[str, Mapping[str, int]]
    packing: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of_ranks(
        cls,
        name: str,
        datasets: Sequence[str],
        counts: Sequence[Sequence[Mapping[str, int]]],
        packing: Mapping[str, int] | None = None,
    ) -> InstructionCuts:
        """Sum the counts of all ranks; `counts` has one entry per rank and dataset."""
        by_dataset = {
            dataset: {key: sum(mine[place].get(key, 0) for mine in counts) for key in _COUNTED}
            for place, dataset in enumerate(datasets)
        }
        return cls(name, by_dataset, packing or {})

    @property
    def report(self) -> dict[str, Any]:
        """Counts of all datasets together and of each, for `metrics.jsonl`."""
        counts = self.by_dataset.values()
        total = {name: sum(count[name] for count in counts) for name in _COUNTED}
        by_dataset = {name: dict(count) for name, count in self.by_dataset.items()}
        return {**total, **self.packing, "by_dataset": by_dataset}

    @property
    def warning(self) -> str:
        """Line on the packing and the cuts by dataset; empty if nothing is packed or cut."""
        parts = [self._packing_text()] if self.packing else []
        for name, counts in self.by_dataset.items():
            found = [f"{counts[key]} {words}" for key, words in CUTS.items() if counts[key]]
            if found:
                parts.append(f"of {counts['examples']} examples of {name}: {', '.join(found)}")
        return "; ".join(parts)

    def _packing_text(self) -> str:
        samples, examples, tokens, padding = (self.packing[name] for name in PACKED)
        share = padding / max(1, tokens + padding)
        return f"{examples} examples packed into {samples}, {share:.1%} padding"


def count_cuts(
    dataset: InstructionDataset,
    tokenizer: Tokenizer,
    num_datasets: int,
    first: int = 0,
    step: int = 1,
) -> list[Counter[str]]:
    """Count the cuts in every `step`-th example that is read, from `first` on, by dataset."""
    counts: list[Counter[str]] = [Counter() for _ in range(num_datasets)]
    for number in range(num_datasets):
        for place, example in enumerate(dataset.examples_read(number)):
            if place % step == first:
                counts[number] += cuts_of(example, dataset.format, tokenizer)
    return counts


def cuts_of(
    example: InstructionExample, format: InstructionFormat, tokenizer: Tokenizer
) -> Counter[str]:
    """Count what `encode_example` cuts from one example.

    Raises:
        CorpusError: the example has no answer to learn.
    """
    fitted = fit_example(example, format, tokenizer)
    prompt = fitted.prompt
    whole = tokenizer.tokenize(prompt.before + prompt.question)
    # After a passage, the question's first tokens may be different and fewer.
    question_cut = not fitted.context_length and len(fitted.prompt_tokens) < len(whole)
    turns_dropped = len(example.turns) - len(fitted.example.turns)
    context_cut = fitted.context_length < len(tokenizer.tokenize(prompt.context))
    cut, dropped = _passages_cut(fitted, tokenizer) if context_cut else (0, 0)
    for_encoder = encoder_passages(example, format) if format.num_encoder_passages else ()
    longer = any(len(tokenizer.tokenize(text)) > format.retrieved_length for text in for_encoder)
    return Counter(
        examples=1,
        prompts_cut=int(question_cut or context_cut or turns_dropped > 0),
        questions_cut=int(question_cut),
        encoder_passages_cut=int(longer),
        passages_cut=cut,
        passages_dropped=dropped,
        turns_dropped=turns_dropped,
        answers_cut=int(_length(fitted, format) > format.sequence_length + 1),
        answers_not_learned=_answers_not_learned(fitted, format),
    )


def _passages_cut(fitted: FittedExample, tokenizer: Tokenizer) -> tuple[int, int]:
    """Number of passages cut, and number dropped, in the prompt."""
    kept, passages = fitted.context_length, fitted.prompt.passages
    ends = [len(tokenizer.tokenize(text)) for text in _beginnings(passages)]
    whole = sum(end <= kept for end in ends)
    before = "\n\n".join(passages[:whole]) + "\n\n" if whole else ""
    is_cut = whole < len(passages) and kept > len(tokenizer.tokenize(before))
    return int(is_cut), len(passages) - whole - int(is_cut)


def _beginnings(passages: Sequence[str]) -> list[str]:
    """The first passage, the first two, and so on, as written in a prompt."""
    return ["\n\n".join(passages[: count + 1]) for count in range(len(passages))]


def _length(fitted: FittedExample, format: InstructionFormat) -> int:
    """Number of tokens of the example with complete answers."""
    answers = sum(len(ids) + learned for ids, learned in fitted.parts)
    return len(format.beginning) + len(fitted.prompt_tokens) + answers


def _answers_not_learned(fitted: FittedExample, format: InstructionFormat) -> int:
    """Number of answers of a chat that should all be learned, but appear only in the prompt."""
    if format.loss_on != "answers" or not fitted.example.turns:
        return 0
    answers = sum(turn.role == "assistant" for turn in fitted.example.turns)
    return answers - sum(learned for _, learned in fitted.parts)
