"""Retro in EleutherAI's lm-evaluation-harness: importing this registers the model `retro_mcore`.

    python -m retro_mcore.cli.lm_eval run --model retro_mcore \\
        --model_args project_dir=project,load=checkpoints,retro_neighbors=live --tasks wikitext

Under torchrun every rank runs the harness, which sees only one rank. The model divides the requests
among the ranks.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal

import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from retro_mcore.distributed import get_rank, initialize, raise_together
from retro_mcore.errors import ConfigurationError, RetroError, raise_problems
from retro_mcore.evaluation.generation_settings import GenerationSettings, read_settings
from retro_mcore.platform import distributed_backend, setup_device
from retro_mcore.progress import track
from retro_mcore.time_limit import INFERENCE_MINUTES

_LOGGER = logging.getLogger(__name__)

#: Tokens of a context and of its continuation.
Encoded = tuple[list[int], list[int]]


@register_model("retro_mcore")
class RetroLM(TemplateLM):
    """A trained model for the harness.

    Args:
        project_dir: Its project: tokenizer, database and index.
        load: Directory of its checkpoints; the latest is evaluated.
        retro_neighbors: "live": neighbors of each complete chunk, from the project's index.
            "none": the encoder is off.
        batch_size: Requests per forward pass.
        max_length: Maximum tokens per pass. Default: the model's window. The beginning of longer
            contexts is cut, which is reported with their number.
        max_gen_toks: Maximum tokens of an answer, unless a task sets it.
        add_bos_token: Begin every text with the tokenizer's BOS, or with EOD if it has none.
            Default: as the project's documents begin. If they have no BOS, only a text without
            context begins with a special token, EOD.
        seed: Seed of sampling, if a task requests sampling; request i uses seed + i.
        tensor_model_parallel_size: Ranks that share one model.
        device: "auto", "cpu" or "cuda".
        max_batch_size: Has no effect; the harness passes it to every model.
        retro_attention_gate: Scale of the cross-attention output. Default: the checkpoint's. A
            model tuned with 0 needs 1 to use its neighbors.
        others: Rejected by name.

    Raises:
        RetroError: an argument, the project or the checkpoint is invalid.
    """

    def __init__(
        self,
        project_dir: str,
        load: str,
        *,
        retro_neighbors: Literal["live", "none"] = "live",
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        seed: int = 1234,
        tensor_model_parallel_size: int = 1,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        max_batch_size: int | None = None,
        retro_attention_gate: float | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        for name, value in others.items():
            raise ConfigurationError(
                f"--model_args {name}", repr(value), "retro_mcore has no such argument"
            )
        if retro_neighbors not in ("live", "none"):
            raise ConfigurationError("retro_neighbors", str(retro_neighbors), "Use live or none")
        if add_bos_token not in (None, True, False):
            raise ConfigurationError("add_bos_token", repr(add_bos_token), "Use true or false")
        _require_numbers(
            max_length=max_length,
            max_gen_toks=max_gen_toks,
            seed=seed,
            tensor_model_parallel_size=tensor_model_parallel_size,
            retro_attention_gate=retro_attention_gate,
        )
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigurationError("batch_size", str(batch_size), "Give a number from 1")
        setup_device(device)
        initialize(distributed_backend(), INFERENCE_MINUTES)
        from retro_mcore import session
        from retro_mcore.evaluation.continuations import ContinuationScorer
        from retro_mcore.training.options.pretrain import ParallelOptions

        self._loaded = session.load_model(
            project_dir,
            load,
            retrieval=retro_neighbors == "live",
            layout=ParallelOptions(
                device=device, tensor_model_parallel_size=tensor_model_parallel_size
            ),
            retro_attention_gate=retro_attention_gate,
        )
        if max_length is not None and not 1 <= max_length <= self._loaded.window:
            raise ConfigurationError(
                "max_length", str(max_length), f"The model's window is {self._loaded.window}"
            )
        self._scorer = ContinuationScorer(self._loaded, int(batch_size), max_length)
        self._batch_size, self._max_gen_toks, self._seed = int(batch_size), max_gen_toks, seed
        adds = self._loaded.tokenizer.adds_bos if add_bos_token is None else add_bos_token
        self._add_bos = bool(adds)
        self._device = next(self._loaded.model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-document token."""
        return self._loaded.tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """Id of the token that precedes a text without context."""
        bos = self._loaded.tokenizer.bos
        return bos if self._add_bos and bos is not None else self.eot_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text, after BOS if the model adds it."""
        tokens = self._loaded.tokenizer.tokenize(string)
        adds = self._add_bos if add_special_tokens is None else add_special_tokens
        return [self.prefix_token_id, *tokens] if adds else tokens

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether it is greedy."""
        encoded = [(request.args, *self._encode(*request.args)) for request in requests]
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def _encode(self, context: str, continuation: str) -> Encoded:
        """At least one context token, and all tokens of the continuation."""
        if not context:
            return [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
        context_ids, continuation_ids = self._encode_pair(context, continuation)
        if continuation and not continuation_ids:  # merged into the context
            continuation_ids = self.tok_encode(continuation, add_special_tokens=False)
        return context_ids or [self.prefix_token_id], continuation_ids

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [
            (context or [self.prefix_token_id], continuation)
            for _, context, continuation in requests
        ]
        results = self._scorer.score(pairs, "loglikelihood")
        for (key, _, _), result in zip(requests, results, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        _log_notes(self._notes(pairs), len(pairs))
        return results

    def _notes(self, pairs: Sequence[Encoded]) -> Counter[str]:
        """Count the requests that are not scored unchanged, by reason."""
        notes: Counter[str] = Counter()
        window = self._scorer.max_length
        for context, continuation in pairs:
            if not continuation:
                notes["no continuation: likelihood 1"] += 1
            elif len(continuation) > window:
                notes[f"a continuation longer than the window of {window}: scored in pieces"] += 1
            elif len(context) + len(continuation) > window + 1:
                notes[f"more than the window of {window}: the context lost its beginning"] += 1
            self._note_length(min(len(context) + len(continuation) - 1, window), notes)
        return notes

    def _note_length(self, num_tokens: int, notes: Counter[str]) -> None:
        trained = self._loaded.arguments.seq_length
        if num_tokens > trained:
            notes[f"longer than the {trained} tokens of the training samples"] += 1

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, through windows with minimal overlap."""
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            # The prefix is the BOS, if there is one.
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(
                tokens, self.prefix_token_id, self._scorer.max_length, 1
            ):
                windows.append(make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        results = self._scorer.score(windows, "loglikelihood_rolling")
        for owner, (likelihood, _) in zip(owners, results, strict=True):
            totals[owner] += likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Generate texts up to a stop text. Requests with equal settings are batched together.

        Raises:
            ConfigurationError: a request has an unsupported setting; raised before any is answered.
        """
        from megatron.core import parallel_state

        notes: Counter[str] = Counter()
        settings = [self._settings(request.args[1], notes) for request in requests]
        prompts = [
            self._prompt(request.args[0], each.max_new_tokens, notes)
            for request, each in zip(requests, settings, strict=True)
        ]
        _log_notes(notes, len(prompts))
        batches = list(self._batches(prompts, settings))
        first = parallel_state.get_data_parallel_rank()
        mine = batches[first :: parallel_state.get_data_parallel_world_size()]
        answers: dict[int, str] = {}
        hidden = disable_tqdm or get_rank() != 0
        with raise_together():
            for batch in track(mine, "generate_until", hidden=hidden):
                texts = self._generate({i: prompts[i] for i in batch}, settings[batch[0]])
                answers.update(zip(batch, texts, strict=True))
        answers = _union(answers, parallel_state.get_data_parallel_group())
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, answers[number])
        return [answers[number] for number in range(len(requests))]

    def _settings(self, given: Mapping[str, Any], notes: Counter[str]) -> GenerationSettings:
        settings = read_settings(given, self._max_gen_toks, self._seed, notes)
        most = self._scorer.max_length // 2  # at least half of the window is for the context
        if settings.max_new_tokens <= most:
            return settings
        notes[f"more than half of the window asked for: answers end after {most} tokens"] += 1
        return replace(settings, max_new_tokens=most)

    def _prompt(self, text: str, max_new_tokens: int, notes: Counter[str]) -> list[int]:
        """The last tokens of a text, as many as leave room for the answer."""
        tokens = self.tok_encode(text) or [self.prefix_token_id]
        room = self._scorer.max_length - max_new_tokens
        if len(tokens) > room:
            notes["context and answer are more than the window: it lost its beginning"] += 1
        self._note_length(min(len(tokens), room) + max_new_tokens, notes)
        return tokens[-room:]

    def _batches(
        self, prompts: Sequence[Sequence[int]], settings: Sequence[GenerationSettings]
    ) -> Iterator[list[int]]:
        """Batches of request numbers with equal settings, longest first."""

        def key(number: int) -> str:
            return repr(settings[number])

        for _, group in groupby(sorted(range(len(prompts)), key=key), key):
            same = sorted(group, key=lambda number: -len(prompts[number]))
            for start in range(0, len(same), self._batch_size):
                yield same[start : start + self._batch_size]

    def _generate(
        self, prompts: Mapping[int, list[int]], settings: GenerationSettings
    ) -> list[str]:
        """Answers to the prompts, by request number."""
        from retro_mcore.inference.generation import generate
        from retro_mcore.inference.growing_text import new_text
        from retro_mcore.inference.requests import GenerationRequest, StoppingOptions

        if not settings.max_new_tokens:
            return [""] * len(prompts)
        sampling = settings.sampling
        requests = [
            GenerationRequest(
                tokens=prompt,
                # Seeded by the request's number, so the rest of its batch does not matter.
                sampling=replace(sampling, seed=sampling.seed + number),
                stopping=StoppingOptions(settings.max_new_tokens, stop_strings=settings.stop),
                neighbors=self._loaded.retriever,
                number=place,
            )
            for place, (number, prompt) in enumerate(prompts.items())
        ]
        texts = generate(self._loaded.model, self._loaded.tokenizer, requests)
        return [new_text(self._loaded.tokenizer, text) for text in texts]


def _require_numbers(**values: float | None) -> None:
    """Reject values that the harness parsed as text, and negative ones."""
    problems: list[RetroError] = []
    for name, value in values.items():
        wanted = (int, float) if name == "retro_attention_gate" else int
        is_number = isinstance(value, wanted) and not isinstance(value, bool)
        if value is not None and not (is_number and value >= 0):
            problems.append(ConfigurationError(name, repr(value), "Give a number from 0"))
    raise_problems(problems)


def _log_notes(notes: Counter[str], num_requests: int) -> None:
    """Report what was cut or changed, each kind once with its count."""
    if get_rank() == 0:
        for note, count in notes.items():
            _LOGGER.warning("%d of %d requests: %s", count, num_requests, note)


def _union(answers: dict[int, str], group: dist.ProcessGroup) -> dict[int, str]:
    """Merge the answers of all data parallel ranks, on every rank."""
    parts: list[dict[int, str]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(parts, answers, group=group)
    return {number: text for part in parts for number, text in part.items()}
