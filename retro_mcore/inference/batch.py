"""Continuous batching: requests join and leave a batch of growing texts between two tokens.

Under tensor and pipeline parallelism every rank of the model adds the same requests and runs the
same steps. The model's first rank retrieves, and the first rank of its last stage samples. The
other ranks receive neighbors and tokens, so rounding differences cannot make ranks diverge.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from retro_mcore.distributed import PeerError, broadcast_object, get_rank, get_world_size
from retro_mcore.errors import ConfigurationError, RetroError
from retro_mcore.inference.credit import text_credit
from retro_mcore.inference.decoders import CachedDecoder, Decoder
from retro_mcore.inference.growing_text import Detokenizer, GrowingText, find_stop
from retro_mcore.inference.requests import GenerationRequest, Vocabulary, end_tokens, num_tokens
from retro_mcore.inference.sampling import require_numbers, sample, token_logprobs
from retro_mcore.inference.texts import FinishReason, GeneratedText, TokenLogprobs
from retro_mcore.platform.parallel import model_parallel_group
from retro_mcore.retrieval.neighbors import (
    CompletedChunk,
    NeighborSource,
    Prefetching,
    RetrievedNeighbors,
)

if TYPE_CHECKING:
    from retro_mcore.model.model import RetroModel

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass
class _Member:
    """A request and its state."""

    request: GenerationRequest
    text: GeneratedText
    generator: torch.Generator
    new_text: GrowingText | None
    endings: dict[int, FinishReason]

    @cached_property
    def ending_tokens(self) -> torch.Tensor:
        """Tokens that end the text; cached, since there may be many."""
        return torch.tensor(list(self.endings))


#: Ends of texts that are whole.
_COMPLETE = ("eod", "stop", "length")
#: A new token and its log-probabilities, as the sampling rank sends them.
_Choice = tuple[int, TokenLogprobs | None]


class TextBatch:
    """Texts that grow together, one token per step.

    A failure of one text (its search, its logits, its stop strings) ends only that text, with its
    `error` set on every rank. The other texts continue.

    Args:
        model: The model, or this rank's pipeline stage of it, in eval mode; a DecoderModel without
            neighbors.
        tokenizer: Provides EOD and the number of valid tokens.
        max_batch_size: Maximum number of texts at a time.
        max_length: Maximum tokens of a text; by default, and at most, the model's window.
        decoder: Runs the model; by default a `CachedDecoder`.
    """

    def __init__(
        self,
        model: RetroModel,
        tokenizer: Vocabulary,
        max_batch_size: int,
        max_length: int | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        self._model, self._tokenizer, self.max_batch_size = model, tokenizer, max_batch_size
        self.max_length = max_length or model.max_sequence_length
        self._decoder = decoder or CachedDecoder(
            model, tokenizer.eod, max_batch_size, self.max_length
        )
        self._num_tokens = num_tokens(model, tokenizer)
        self._group = model_parallel_group(model)
        self._sampling_rank = _sampling_rank(model, self._group)
        self._members: list[_Member] = []

    @property
    def growing(self) -> list[GeneratedText]:
        """Texts that have not ended."""
        return [member.text for member in self._members]

    def add(self, request: GenerationRequest) -> GeneratedText:
        """Add a text; it gets its first new token in the next step.

        Args:
            request: A request accepted by `check_request`.

        Raises:
            ConfigurationError: there is no room.
        """
        if len(self._members) == self.max_batch_size:
            raise ConfigurationError(
                "batch",
                f"{self.max_batch_size} texts are running already",
                "Wait until one has ended",
            )
        text = GeneratedText(
            list(request.tokens), len(request.tokens), two_chunks=request.two_chunks
        )
        new_text = None
        if request.stopping.stop_strings:
            assert isinstance(self._tokenizer, Detokenizer), "check_request refuses others"
            new_text = GrowingText(self._tokenizer, request.tokens)
        (generator,) = request.sampling.generators(1)
        endings: dict[int, FinishReason] = dict.fromkeys(request.stopping.stop_tokens, "stop")
        for token in end_tokens(self._tokenizer):
            endings.setdefault(token, "eod")
        member = _Member(request, text, generator, new_text, endings)
        self._members.append(member)
        self._expect([member])
        return text

    def drop(self, text: GeneratedText) -> None:
        """Drop a text before it has ended."""
        text.finish_reason = text.finish_reason or "dropped"
        self._keep_growing()

    @torch.no_grad()
    def step(self) -> list[tuple[GeneratedText, int]]:
        """Generate one token for every text; returns the texts that got one, with their tokens.

        A text without a token has ended. A failed text has ended with an `error`.
        """
        if not self._members:
            return []
        self._retrieve()
        self._keep_growing()
        self._score_prompts()
        self._keep_growing()
        if not self._members:
            return []
        logits_BV = self._decoder.next_logits([member.text for member in self._members])
        choices = self._choose(logits_BV)
        added = []
        for member, choice in zip(self._members, choices, strict=True):
            if isinstance(choice, Exception):
                self._fail(member, choice)
            elif self._accept(member, choice):
                added.append((member.text, choice[0]))
        self._keep_growing()
        self._expect(self._members)
        return added

    def _chunk_length(self) -> int:
        return self._model.config.retro_chunk_length

    def _retrieve(self) -> None:
        """Retrieve neighbors for complete chunks that have none yet."""
        wanted = [
            (member, chunk)
            for member in self._members
            if member.request.neighbors is not None
            for chunk in self._chunks_of(member)
        ]
        if not wanted:
            return
        # In one message: other ranks do not know which texts share a source.
        found: object = self._search_all(wanted) if get_rank(self._group) == 0 else None
        found = broadcast_object(found, self._group)
        assert isinstance(found, list)
        for (member, _), neighbors in zip(wanted, found, strict=True):
            if isinstance(neighbors, Exception):
                self._fail(member, neighbors)
            else:
                member.text.neighbors.append(neighbors)

    def _search_all(
        self, wanted: Sequence[tuple[_Member, CompletedChunk]]
    ) -> list[RetrievedNeighbors | Exception]:
        """Search neighbors of chunks, with one search per source."""
        places: dict[int, list[int]] = {}
        for place, (member, _) in enumerate(wanted):
            places.setdefault(id(member.request.neighbors), []).append(place)
        found: dict[int, RetrievedNeighbors | Exception] = {}
        for same in places.values():
            source = wanted[same[0]][0].request.neighbors
            assert source is not None
            results = self._search(source, [wanted[place][1] for place in same])
            found.update(zip(same, results, strict=True))
        return [found[place] for place in range(len(wanted))]

    def _search(
        self, source: NeighborSource, chunks: Sequence[CompletedChunk]
    ) -> list[RetrievedNeighbors | Exception]:
        """Search each chunk's neighbors: together if possible, else one by one."""

        def search(some: Sequence[CompletedChunk]) -> list[RetrievedNeighbors]:
            found = source.neighbors_of(some)
            return [found.chunk(place) for place in range(len(some))]

        together = self._attempt(lambda: search(chunks))
        if not isinstance(together, Exception):
            return list(together)
        if len(chunks) == 1:
            return [together]
        alone = [self._attempt(lambda chunk=chunk: search([chunk])) for chunk in chunks]  # type: ignore[misc]
        return [found if isinstance(found, Exception) else found[0] for found in alone]

    def _attempt(self, action: Callable[[], _T]) -> _T | Exception:
        """The result of an action, or its error in a picklable form for other ranks."""
        try:
            return action()
        except Exception as error:  # ends the text that it belongs to
            if isinstance(error, RetroError) or get_world_size(self._group) == 1:
                return error
            _LOG.exception("a text failed")
            return PeerError(f"rank {get_rank(self._group)} failed: {type(error).__name__}")

    @staticmethod
    def _fail(member: _Member, error: Exception) -> None:
        member.text.error = member.text.error or error
        member.text.finish_reason = "failed"

    def _chunks_of(self, member: _Member, ahead: bool = False) -> list[CompletedChunk]:
        """Complete chunks without neighbors; with `ahead`, chunks whose query is complete."""
        text, source = member.text, member.request.neighbors
        lead = source.lead if isinstance(source, Prefetching) and not text.two_chunks else 0
        stop = len(text.tokens) + (lead if ahead else 0)
        places = list(enumerate(text.chunks(self._chunk_length(), 0, stop)))
        return [
            CompletedChunk(
                member.request.number, number, text.tokens[place.start : place.stop - lead]
            )
            for number, place in places[len(text.neighbors) :]
        ]

    def _expect(self, members: Sequence[_Member]) -> None:
        """Start searches in sources that can search ahead."""
        for member in members:
            source = member.request.neighbors
            if isinstance(source, Prefetching) and get_rank(self._group) == 0:
                chunks = self._chunks_of(member, ahead=True)
                # A search that cannot start fails when its result is requested.
                self._attempt(lambda source=source, chunks=chunks: source.expect(chunks))  # type: ignore[misc]

    def _keep_growing(self) -> None:
        """Remove texts that have ended, after crediting their neighbors if requested."""
        for member in self._members:
            text = member.text
            wanted = member.request.neighbor_credit and text.neighbors
            if wanted and text.finish_reason in _COMPLETE:
                self._credit(member)
        for member in self._members:
            source = member.request.neighbors
            if member.text.finish_reason is not None and isinstance(source, Prefetching):
                source.forget(member.request.number)
        self._members = [member for member in self._members if member.text.finish_reason is None]

    def _score_prompts(self) -> None:
        for member in self._members:
            request, text = member.request, member.text
            if request.prompt_logprobs and not text.prompt_logprobs and not text.new_tokens:
                self._score_prompt(member)
            if request.stopping.max_new_tokens == 0:
                text.finish_reason = text.finish_reason or "length"

    def _score_prompt(self, member: _Member) -> None:
        logits_SV = self._decoder.prompt_logits(member.text)
        scores: object = None
        if self._samples():
            assert logits_SV is not None
            logits_SV = logits_SV[:-1, : self._num_tokens]
            tokens, num_top = member.text.tokens[1:], member.request.top_logprobs or 0
            scores = self._attempt(lambda: token_logprobs(logits_SV, tokens, num_top))
        scores = broadcast_object(scores, self._group, self._sampling_rank)
        if isinstance(scores, Exception):
            self._fail(member, scores)
            return
        assert isinstance(scores, list)
        member.text.prompt_logprobs = scores

    def _credit(self, member: _Member) -> None:
        text = member.text
        found: object = text_credit(
            self._decoder, text, self._chunk_length(), self._tokenizer.eod, self._num_tokens
        )
        if self._samples() and isinstance(found, np.ndarray):
            gains = torch.from_numpy(found)
            found = self._attempt(lambda: require_numbers(gains.abs())) or found
        found = broadcast_object(found, self._group, self._sampling_rank)
        if isinstance(found, Exception):
            self._fail(member, found)
            return
        assert found is None or isinstance(found, np.ndarray)
        text.neighbor_credit = found

    def _samples(self) -> bool:
        return get_rank(self._group) == self._sampling_rank

    def _choose(self, logits_BV: torch.Tensor | None) -> list[_Choice | Exception]:
        """The next tokens chosen by the sampling rank, or the errors instead."""
        choices: object = None
        if self._samples():
            assert logits_BV is not None
            logits_BV = logits_BV[:, : self._num_tokens]  # the rest is padding
            choices = [
                self._attempt(lambda member=member, row_V=row_V: self._choose_for(member, row_V))  # type: ignore[misc]
                for member, row_V in zip(self._members, logits_BV, strict=True)
            ]
        choices = broadcast_object(choices, self._group, self._sampling_rank)
        assert isinstance(choices, list)
        return choices

    def _choose_for(self, member: _Member, logits_V: torch.Tensor) -> _Choice:
        request = member.request
        require_numbers(logits_V)
        allowed_V = request.adjustments.apply(logits_V, member.text.new_tokens)
        if len(member.text.new_tokens) < request.stopping.min_new_tokens:
            allowed_V = allowed_V.clone()
            endings = member.ending_tokens.to(allowed_V.device)
            allowed_V[endings[endings < self._num_tokens]] = -torch.inf
        (token,) = sample(allowed_V[None], request.sampling, [member.generator])
        if request.top_logprobs is None:
            return token, None
        return token, token_logprobs(logits_V[None], [token], request.top_logprobs)[0]

    def _accept(self, member: _Member, choice: _Choice) -> bool:
        """Add a token to its text; False if the token ends the text instead."""
        token, logprobs = choice
        text, stopping = member.text, member.request.stopping
        if token in member.endings:
            text.finish_reason = member.endings[token]
            text.end_logprob = None if logprobs is None else logprobs.logprob
            return False
        text.tokens.append(token)
        if logprobs is not None:
            text.logprobs.append(logprobs)
        if len(text.new_tokens) == stopping.max_new_tokens:
            text.finish_reason = "length"
        failure = self._attempt(lambda: self._look_for_stop(member, token))
        if failure is not None:
            self._fail(member, failure)
        return True

    def _look_for_stop(self, member: _Member, token: int) -> None:
        text, stopping = member.text, member.request.stopping
        if member.new_text is None:
            return
        already = len(member.new_text.text)
        member.new_text.add(token)
        if text.finish_reason == "length":
            member.new_text.finish()
        if len(text.new_tokens) < stopping.min_new_tokens:
            return
        place = find_stop(member.new_text.text, stopping.stop_strings, already)
        if place is not None:
            text.finish_reason, text.stop_text = "stop", member.new_text.text[:place]


def _sampling_rank(model: RetroModel, group: dist.ProcessGroup | None) -> int:
    """Rank in `group` of the last stage's first tensor parallel rank."""
    size = get_world_size(group)
    if size == 1:
        return 0
    mine = model.post_process and get_rank(model.pg_collection.tp) == 0
    sampling: list[bool] = [False] * size
    dist.all_gather_object(sampling, mine, group=group)
    return sampling.index(True)
