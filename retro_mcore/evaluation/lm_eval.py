"""Retro in EleutherAI's lm-evaluation-harness: importing this registers the model `retro_mcore`.

    python -m retro_mcore.cli.lm_eval run --model retro_mcore \\
        --model_args project_dir=project,load=checkpoints,retro_neighbors=live --tasks wikitext

Under torchrun every rank runs the harness, and the model deals the requests out among them; the
harness itself is told of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal

import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from retro_mcore.distributed import get_rank, initialize
from retro_mcore.errors import ConfigurationError
from retro_mcore.inference.sampling import SamplingOptions
from retro_mcore.platform import distributed_backend, setup_device

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")


@register_model("retro_mcore")
class RetroLM(TemplateLM):
    """A trained model for the harness.

    Args:
        project_dir: Its project: tokenizer, database and index.
        load: Directory of its checkpoints; the latest is evaluated.
        retro_neighbors: "live": neighbors of each complete chunk, from the project's index.
            "none": the encoder is off.
        batch_size: Requests per forward pass.
        max_length: Tokens read at once. Default: the model's window.
        max_gen_toks: Longest answer, where a task does not say.
        seed: Of sampling, where a task asks for it.
        tensor_model_parallel_size: Ranks that share one model.
        device: "auto", "cpu" or "cuda".
        max_batch_size: Of no effect; the harness hands it to every model.
        retro_attention_gate: Scale of what the model reads in its neighbors. Default: as it was
            trained; a model that was tuned with 0 needs 1 here to read any.

    Raises:
        RetroError: an argument, the project or the checkpoint is at fault.
    """

    def __init__(
        self,
        project_dir: str,
        load: str,
        retro_neighbors: Literal["live", "none"] = "live",
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 1234,
        tensor_model_parallel_size: int = 1,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        max_batch_size: int | None = None,
        retro_attention_gate: float | None = None,
    ) -> None:
        super().__init__()
        if retro_neighbors not in ("live", "none"):
            raise ConfigurationError("retro_neighbors", str(retro_neighbors), "Use live or none")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigurationError("batch_size", str(batch_size), "Give a number from 1")
        setup_device(device)
        initialize(distributed_backend())
        # Megatron is imported only after the device is set up.
        from retro_mcore.evaluation.continuations import ContinuationScorer
        from retro_mcore.evaluation.loaded_model import LoadedModel

        self._loaded = LoadedModel.load(
            project_dir,
            load,
            retro_neighbors == "live",
            tensor_model_parallel_size,
            device=device,
            retro_attention_gate=retro_attention_gate,
        )
        if max_length is not None and not 1 <= max_length <= self._loaded.window:
            raise ConfigurationError(
                "max_length", str(max_length), f"The model's window is {self._loaded.window}"
            )
        self._scorer = ContinuationScorer(self._loaded, int(batch_size), max_length)
        self._batch_size, self._max_gen_toks, self._seed = int(batch_size), max_gen_toks, seed
        self._device = next(self._loaded.model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document; it stands before a text without context."""
        return self._loaded.tokenizer.eod

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text, without special ones."""
        return self._loaded.tokenizer.tokenize(string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        results = self._scorer.score(pairs, "loglikelihood")
        for (key, _, _), result in zip(requests, results, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, through windows that overlap as little as they can."""
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.eot_token_id, self._scorer.max_length, 1
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
        """Texts up to a stop text, requests of the same settings batched together."""
        from megatron.core import parallel_state

        def key(number: int) -> str:
            return repr(sorted(requests[number].args[1].items(), key=str))

        batches = []
        for _, group in groupby(sorted(range(len(requests)), key=key), key):
            same = sorted(group, key=lambda number: -len(requests[number].args[0]))
            size = self._batch_size
            batches += [same[start : start + size] for start in range(0, len(same), size)]
        first = parallel_state.get_data_parallel_rank()
        mine = batches[first :: parallel_state.get_data_parallel_world_size()]
        answers: dict[int, str] = {}
        for batch in tqdm(mine, desc="generate_until", disable=disable_tqdm or get_rank() != 0):
            texts = self._generate([requests[i].args[0] for i in batch], requests[batch[0]].args[1])
            answers.update(zip(batch, texts, strict=True))
        answers = _union(answers, parallel_state.get_data_parallel_group())
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, answers[number])
        return [answers[number] for number in range(len(requests))]

    def _generate(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        from retro_mcore.inference.generation import generate
        from retro_mcore.inference.growing_text import new_text

        until = settings.get("until") or []
        longest = next((settings[n] for n in _LENGTHS if n in settings), self._max_gen_toks)
        # At least half of the window is the context's.
        longest = min(int(longest), self._scorer.max_length // 2)
        room = self._scorer.max_length - longest
        tokenizer = self._loaded.tokenizer
        prompts = [(self.tok_encode(text) or [tokenizer.eod])[-room:] for text in contexts]
        texts = generate(
            self._loaded.model,
            tokenizer,
            prompts,
            max_new_tokens=longest,
            stop_strings=[until] if isinstance(until, str) else until,
            sampling=_sampling(settings, self._seed),
            neighbors=self._loaded.retriever,
        )
        return [new_text(tokenizer, text) for text in texts]


def _sampling(settings: dict[str, Any], seed: int) -> SamplingOptions:
    """As a task asks: greedy, unless it says `do_sample` or gives a temperature."""
    temperature = float(settings.get("temperature", 1.0 if settings.get("do_sample") else 0.0))
    if settings.get("do_sample") is False:
        temperature = 0.0
    options = SamplingOptions(temperature=temperature, seed=seed)
    if temperature == 0:
        return options
    return replace(
        options, top_k=int(settings.get("top_k", 0)), top_p=float(settings.get("top_p", 0.0))
    )


def _union(answers: dict[int, str], group: dist.ProcessGroup) -> dict[int, str]:
    """Every data parallel rank's answers, on all of them."""
    parts: list[dict[int, str]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(parts, answers, group=group)
    return {number: text for part in parts for number, text in part.items()}
