"""Retro as a transformers model: plain torch, without Megatron.

`RetroForCausalLM` reads the neighbors of each chunk as an argument, or gets them from a function of
the chunk's tokens, also while it generates.

Shapes: B batch, S tokens of the pass, L chunks that it completes in a row, N chunks in all,
M chunk length, K neighbors, R retrieved length, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from .chunks_retro import ChunkPlan, RetroCache, Spans, spans_of
from .configuration_retro import RetroConfig
from .layers_retro import RetroDecoderLayer, RetroNeighborEncoder
from .linear_retro import RetroNorm
from .mlp_retro import RetroRouter
from .rotary_retro import Angles, Rotary

logger = logging.get_logger(__name__)

#: Tokens of chunks `[N, M]` to those of their neighbors `[N, K, R]`; -1 is padding or missing.
Retriever = Callable[[Tensor], Any]


class RetroPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about Retro."""

    config_class = RetroConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RetroDecoderLayer", "RetroEncoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        config = self.config
        if isinstance(module, (nn.Linear, nn.Embedding, RetroRouter)):
            uniform = config.init_method_xavier_uniform and not config.retro_deepnorm
            std = getattr(module, "initial_deviation", None)
            if isinstance(module, nn.Embedding) and config.embedding_init_method_std is not None:
                std, uniform = config.embedding_init_method_std, False
            if std is None:
                sides = sum(module.weight.shape)
                std = (2.0 / sides) ** 0.5 if uniform else config.init_method_std
            if uniform:
                nn.init.uniform_(module.weight, -(3**0.5) * std, 3**0.5 * std)
            else:
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RetroNorm):
            nn.init.constant_(module.weight, 0.0 if module.centered else 1.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class RetroModel(RetroPreTrainedModel):
    """The decoder with its neighbor encoder, without the output layer."""

    def __init__(self, config: RetroConfig) -> None:
        super().__init__(config)
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions: nn.Embedding | None = None
        if config.position_embedding_type == "learned_absolute":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        #: The rotary embedding of each layer.
        self.rotaries = _rotaries(config)
        self.layers = nn.ModuleList(
            RetroDecoderLayer(config, index, rotary) for index, rotary in enumerate(self.rotaries)
        )
        retrieves = bool(config.cross_attention_layers)
        self.encoder = RetroNeighborEncoder(config) if retrieves else None
        self.norm = (
            RetroNorm(config, config.hidden_size)
            if config.retro_final_layernorm or config.no_retrieval
            else nn.Identity()
        )
        #: Where neighbors come from if `forward` gets none; see `Retriever`.
        self.retriever: Retriever | None = None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of tokens."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        retrieved_input_ids: Tensor | None = None,
        retriever: Retriever | None = None,
        chunk_alignment: str | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states; the arguments are those of `RetroForCausalLM.forward`."""
        config = self.config
        if output_attentions or getattr(config, "output_attentions", False):
            raise ValueError("output_attentions is not supported by Retro")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        recomputes = self.training and _recomputes(self)
        use_cache = (config.use_cache if use_cache is None else use_cache) and not recomputes
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = _cache(past_key_values, use_cache and not self.training)
        past = 0 if cache is None else cache.get_seq_length()
        batch_size, length = inputs_embeds.shape[:2]
        spans = _spans(attention_mask, cache, batch_size, past, length)
        self._check_length(spans)
        if position_ids is None:
            position_ids = _positions(spans, past, length, inputs_embeds.device)
        chunks = self._plan(
            spans, past, length, cache, input_ids, retrieved_input_ids,
            retriever or self.retriever, chunk_alignment or config.retro_chunk_alignment,
            inputs_embeds.device,
        )  # fmt: skip
        plan, neighbors, mask = (None, None, None) if chunks is None else chunks

        def encode(normed: Tensor, embedded: Tensor | None) -> Tensor | None:
            return self._encode(normed, embedded, mask, plan, cache)

        mask_4d, causal = _attention_mask(attention_mask, spans, past, length, inputs_embeds.device)
        states = self._embed(inputs_embeds, position_ids)
        masks = {False: (mask_4d, causal)}
        if config.sliding_window is not None:
            masks[True] = _in_window(masks[False], config.sliding_window, past, states)
        angles = self._angles(position_ids)
        first = min(config.cross_attention_layers, default=0) - 1
        encodes = isinstance(cache, RetroCache) or plan is not None
        hidden_states: list[Tensor] = []
        for number, layer in enumerate(self.layers, start=1):
            hidden_states += [states] if output_hidden_states else []
            mask_4d, causal = masks[config.has_window(number)]
            states, neighbors = layer(
                states,
                neighbors,
                angles=angles[number - 1],
                attention_mask=mask_4d,
                causal=causal,
                plan=plan,
                encode=encode if layer.index == first and encodes else None,
                past_key_values=cache,
                past=past,
            )
        states = self.norm(states)
        hidden_states += [states] if output_hidden_states else []
        output = BaseModelOutputWithPast(
            last_hidden_state=states,
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(hidden_states) or None,
        )
        return output if _as_object(return_dict, config) else output.to_tuple()

    def _embed(self, embedded: Tensor, positions: Tensor) -> Tensor:
        multiplier = self.config.embedding_multiplier
        if multiplier != 1.0:  # rounded to the model's precision, as families do
            embedded = embedded * torch.tensor(multiplier, dtype=embedded.dtype)
        if self.embed_positions is not None:
            embedded = embedded + self.embed_positions(positions)
        return nn.functional.dropout(embedded, self.config.hidden_dropout, self.training)

    def _angles(self, position_ids: Tensor) -> list[Angles | None]:
        """The angles of each layer; those of one rotary embedding are computed once."""
        found: dict[Rotary | None, Angles | None] = {None: None}
        for rotary in self.rotaries:
            if rotary is not None and rotary not in found:
                cosines, sines = rotary.angles(position_ids)
                found[rotary] = cosines[:, None], sines[:, None]
        return [found[rotary] for rotary in self.rotaries]

    def _check_length(self, spans: Spans) -> None:
        longest = max(stop - first for first, stop in spans)
        limit = self.config.longest_text
        if limit is not None and longest > limit:
            raise ValueError(f"a text has {longest} tokens, and the model reads at most {limit}")

    def _plan(
        self, spans: Spans, past: int, length: int, cache: Cache | None, input_ids: Tensor | None,
        retrieved: Tensor | None, retriever: Retriever | None, alignment: str,
        device: torch.device,
    ) -> tuple[ChunkPlan, Tensor | None, Tensor | None] | None:  # fmt: skip
        """The chunks of the pass, their embedded neighbors `[N * K, R, D]` and which of the tokens
        are real, bool `[N * K, R]`. None: retrieval is off."""
        config = self.config
        if self.encoder is None:
            if retrieved is not None or retriever is not None:
                raise ValueError("the model has no retrieval (no_retrieval): give no neighbors")
            return None
        memory = cache if isinstance(cache, RetroCache) else None
        size = config.retro_chunk_length
        if memory is not None:
            memory.begin(past, length, size)
            if not past:
                whole = all((stop - first) % size == 0 for first, stop in spans)
                memory.can_continue = alignment == "left" or whole
            elif not memory.can_continue:
                raise ValueError(
                    "the cache is of a right-aligned chunk grid, which moves with every token: "
                    "give chunk_alignment='left' from the first pass on, as generate() does"
                )
        tokens = None
        if input_ids is None and memory is not None:
            memory.tokens = None  # a chunk that spans this pass is not known in whole
        elif input_ids is not None:
            tokens = input_ids if memory is None else memory.remember_tokens(input_ids, size)
        ongoing = memory is not None and memory.has is not None
        if config.retro_attention_gate == 0 or not (
            retrieved is not None or retriever is not None or ongoing
        ):
            return None
        if cache is not None and memory is None:
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}: with retrieval give a RetroCache, "
                "or none"
            )
        plan = ChunkPlan.of(spans, past, length, size, "left" if past else alignment)
        if not len(plan):
            _require_missing(retrieved, "the pass completes no chunk")
            return plan, None, None
        ids = self._neighbors(plan, tokens, retrieved, retriever)
        return plan, *self._read(plan, ids.to(device), memory, past)

    def _neighbors(
        self, plan: ChunkPlan, tokens: Tensor | None, retrieved: Tensor | None,
        retriever: Retriever | None,
    ) -> Tensor:  # fmt: skip
        """The neighbors' tokens `[N, K, R]` of the plan's chunks."""
        shape = (self.config.retro_num_neighbors, self.config.retrieved_length)
        if retrieved is not None:
            return _given(plan, retrieved, shape)
        if retriever is None:
            return torch.full((len(plan), *shape), -1)
        if tokens is None or len(set(plan.lengths)) > 1:
            raise ValueError(
                "a retriever needs input_ids, and whole chunks (chunk_alignment='left')"
            )
        if min(plan.starts) < plan.length - tokens.size(1):
            raise ValueError(
                "a retriever needs the tokens of whole chunks: give input_ids, not inputs_embeds, "
                "in every pass"
            )
        found = torch.as_tensor(retriever(plan.content(tokens)))
        if found.shape != (len(plan), *shape):
            raise ValueError(
                f"the retriever returned {list(found.shape)}, expected {[len(plan), *shape]}: "
                "chunks, neighbors, tokens of each"
            )
        return found

    def _read(
        self, plan: ChunkPlan, ids: Tensor, memory: RetroCache | None, past: int
    ) -> tuple[Tensor, Tensor | None]:
        """Embed neighbors `[N, K, R]`, and put what is masked into the plan."""
        real = ids >= 0
        if self.config.retro_mask_padding:
            missing = ~real.flatten(1).any(1)
            plan.has, plan.mask = ~missing, real.flatten(1) | missing[:, None]
        else:
            plan.has = torch.ones(len(plan), dtype=torch.bool, device=ids.device)
        if memory is not None:
            memory.attend_to(plan, past)
        pad = self.config.pad_token_id
        if not self.config.retro_mask_padding and pad is None and bool((~real).any()):
            raise ValueError(
                "retrieved_input_ids has -1, which this model reads as the padding token: set "
                "config.pad_token_id"
            )
        ids, real = ids.flatten(0, 1), real.flatten(0, 1)
        positions = torch.arange(ids.size(1), device=ids.device)
        embedded = self._embed(self.embed_tokens(ids.where(real, pad or 0)), positions)
        return embedded, real if self.config.retro_mask_padding else None

    def _encode(
        self, normed: Tensor, embedded: Tensor | None, mask: Tensor | None,
        plan: ChunkPlan | None, cache: Cache | None,
    ) -> Tensor | None:  # fmt: skip
        """Encode the neighbors, and keep the states that later ones are conditioned on."""
        if isinstance(cache, RetroCache):
            normed = cache.remember_states(normed, self.config.retro_chunk_length)
        if embedded is None or plan is None or self.encoder is None:
            return None
        return self.encoder(embedded, plan.content(normed), mask).to(normed.device)


class RetroForCausalLM(RetroPreTrainedModel, GenerationMixin):
    """Retro with its output layer.

        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        model(input_ids, retrieved_input_ids=neighbors, labels=input_ids).loss
        model.generate(input_ids, retriever=function_of_chunks)

    Attributes:
        retriever: Set it, and `forward` and `generate` retrieve wherever they are given nothing:
            a function of tokens `[N, M]` of complete chunks to `[N, K, R]`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: RetroConfig) -> None:
        super().__init__(config)
        self.model = RetroModel(config)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def retriever(self) -> Retriever | None:
        """See the class."""
        return self.model.retriever

    @retriever.setter
    def retriever(self, value: Retriever | None) -> None:
        self.model.retriever = value

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output layer."""
        self.lm_head = new_embeddings

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Embedding:
        """Transformers' method; every row is a token afterwards."""
        resized = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if new_num_tokens is not None:
            self.config.tokenizer_vocab_size = None
        return resized

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        retrieved_input_ids: Tensor | None = None,
        retriever: Retriever | None = None,
        chunk_alignment: str | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, and with labels the loss.

        Args:
            input_ids: `[B, S]`.
            attention_mask: `[B, cached + S]`, 0 = padding, at the ends of a row only; chunks are
                counted from each text's own first token. Or `[B, 1, S, cached + S]`, bool with
                True = attended to or a float to add: then rows have no padding.
                Windows of layers apply besides.
            position_ids: `[B, S]`; default: counted from each text's first token.
            past_key_values: A RetroCache of earlier tokens (padded at the left if at all).
            inputs_embeds: `[B, S, D]` instead of input_ids.
            retrieved_input_ids: `[B, L, K, R]`, the neighbors of the chunks whose last tokens are
                in this pass, in each row from its first such chunk on; -1 = padding or a missing
                neighbor, which nobody attends to. (Models with `retro_mask_padding` false read
                `pad_token_id` in its place.) A chunk of which all is missing is as without
                retrieval. L is the most chunks of a row; rows with fewer have -1 at the end. None:
                retrieval is off, and the model is its decoder.
            retriever: Function that gives them; see the class.
            chunk_alignment: "left" or "right"; default: the configuration's. `generate` uses left.
            labels: `[B, S]`, shifted here, as transformers' models do; -100 does not count.
                Already shifted ones are given as `shift_labels`.
            use_cache: Return a cache. In training none is used.
            output_attentions: Not supported.
            output_hidden_states: Return the input of every layer, and the last norm's output.
            return_dict: False: return a tuple.
            logits_to_keep: The last positions, or which ones, to compute logits of; 0: all.
            **kwargs: For the loss: `shift_labels`, `num_items_in_batch`.

        Raises:
            ValueError: an argument does not fit the others or the model.
        """
        config = self.config
        if output_hidden_states is None:
            output_hidden_states = getattr(config, "output_hidden_states", False)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            retrieved_input_ids=retrieved_input_ids,
            retriever=retriever,
            chunk_alignment=chunk_alignment,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._scaled(self.lm_head(states[:, kept] / config.mup_width))
        if config.tokenizer_vocab_size is not None and not self.training:
            real = torch.arange(logits.size(-1), device=logits.device) < config.tokenizer_vocab_size
            logits = logits.where(real, torch.finfo(logits.dtype).min)
        loss = None
        self._warn_of_left_out_losses()
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.size(-1), **kwargs
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return output if _as_object(return_dict, config) else output.to_tuple()

    def _warn_of_left_out_losses(self) -> None:
        config = self.config
        balances = config.moe_router_load_balancing_type != "none"
        weighed = (balances and config.moe_aux_loss_coeff) or config.moe_z_loss_coeff
        if self.training and config.num_experts is not None and weighed:
            logger.warning_once(
                f"Retro's load-balancing losses are left out in training here "
                f"(moe_aux_loss_coeff {config.moe_aux_loss_coeff}, moe_z_loss_coeff "
                f"{config.moe_z_loss_coeff}): set both to 0 to silence this"
            )

    def _scaled(self, logits: Tensor) -> Tensor:
        scaling, cap = self.config.logits_scaling, self.config.logit_softcap
        logits = logits if scaling == 1.0 else logits / scaling
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        retrieved_input_ids: Tensor | None = None,
        retriever: Retriever | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Transformers' method; `retrieved_input_ids` are those of the prompts' chunks.

        Raises:
            ValueError: `inputs_embeds` with a retriever.
        """
        if inputs_embeds is not None:
            self._check_embedded_prompt(retriever)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            *args,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        inputs |= {"retriever": retriever, "chunk_alignment": "left"}
        if retrieved_input_ids is not None:
            passed = inputs.get("inputs_embeds", inputs.get("input_ids"))
            length = passed.size(1)
            spans = _spans(attention_mask, past_key_values, len(input_ids), past, length)
            inputs["retrieved_input_ids"] = self._given_or_found(
                retrieved_input_ids, input_ids, spans, past, length, retriever or self.retriever
            )
        return inputs

    def _check_embedded_prompt(self, retriever: Retriever | None) -> None:
        if self.model.encoder is not None and (retriever or self.retriever) is not None:
            raise ValueError(
                "generate(inputs_embeds=...) with a retriever, which needs the prompt's tokens: "
                "give input_ids, or retrieved_input_ids instead of the retriever"
            )

    def _given_or_found(
        self, retrieved: Tensor, input_ids: Tensor, spans: Spans, past: int, length: int,
        retriever: Retriever | None,
    ) -> Tensor | None:  # fmt: skip
        """Neighbors of a pass's chunks: those given; of later chunks the retriever's, or none."""
        rows, given, *shape = retrieved.shape
        size = self.config.retro_chunk_length
        plan = ChunkPlan.of(spans, past, length, size, "left")
        chosen = retrieved.new_full((rows, plan.most, *shape), -1)
        later: list[tuple[int, int, Tensor]] = []
        counts = [given] * rows
        if retriever is not None:  # -1 at the end of a row: its text has fewer chunks
            held = (retrieved >= 0).flatten(2).any(2).tolist()
            counts = [max((n for n, has in enumerate(row, 1) if has), default=0) for row in held]
        before = past + length - input_ids.size(1)  # cached tokens that are not passed again
        for row, place, start in zip(plan.rows, plan.places, plan.starts, strict=True):
            chunk = max(past - spans[row][0], 0) // size + place
            if chunk < counts[row]:
                chosen[row, place] = retrieved[row, chunk]
            elif retriever is not None and start + past < before:
                raise ValueError("a chunk began in the cache: pass the whole text to generate()")
            elif retriever is not None:
                first = start + past - before
                later.append((row, place, input_ids[row, first : first + size]))
        if later and retriever is not None:
            found = torch.as_tensor(retriever(torch.stack([tokens for *_, tokens in later])))
            for (row, place, _), neighbors in zip(later, found, strict=True):
                chosen[row, place] = neighbors.to(chosen.device)
        return chosen if plan.most else None

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> Any:
        given = model_kwargs.get("past_key_values") is not None
        result = super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )
        if not given and type(model_kwargs.get("past_key_values")) is DynamicCache:
            offloading = model_kwargs["past_key_values"].offloading
            model_kwargs["past_key_values"] = RetroCache(offloading=offloading)
        return result


def _rotaries(config: RetroConfig) -> list[Rotary | None]:
    """The rotary embedding of each decoder layer."""
    if config.position_embedding_type != "rope":
        return [None] * config.num_layers
    usual, local = Rotary(config, config.kv_channels), None
    if config.rotary_local_base is not None:
        local = Rotary(config, config.kv_channels, base=config.rotary_local_base)
    local_layers, without = config.rotary_local_layers or (), config.no_rope_layers or ()
    return [
        None if number in without else local if number in local_layers else usual
        for number in range(1, config.num_layers + 1)
    ]


def _cache(given: Cache | None, wanted: bool) -> Cache | None:
    if given is None:
        return RetroCache() if wanted else None
    if getattr(given, "is_compileable", False):
        raise ValueError(
            f"past_key_values is a {type(given).__name__}, of a fixed size: give a RetroCache"
        )
    return given


def _recomputes(model: RetroModel) -> bool:
    return any(getattr(layer, "gradient_checkpointing", False) for layer in model.layers)


def _as_object(return_dict: bool | None, config: RetroConfig) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)


def _spans(
    mask: Tensor | None, cache: Cache | None, batch_size: int, past: int, length: int
) -> Spans:
    """The texts of a batch; later passes go on with those of the first one."""
    memory = cache if isinstance(cache, RetroCache) else None
    known = memory.spans if memory is not None and past else None
    if known is None:
        spans = spans_of(mask, batch_size, past + length)
    elif any(stop < past for _, stop in known):
        raise ValueError("a cached text is padded at its right end: pad at the left")
    elif any(first == past for first, _ in known):  # a row of which only padding is cached
        spans = spans_of(mask, batch_size, past + length)
    else:
        spans = [(first, past + length) for first, _ in known]
    if memory is not None:
        memory.spans = spans
    return spans


def _positions(spans: Spans, past: int, length: int, device: torch.device) -> Tensor:
    firsts = torch.tensor([first for first, _ in spans], device=device)
    positions = torch.arange(past, past + length, device=device)
    return (positions - firsts[:, None]).clamp(min=0)


def _attention_mask(
    mask: Tensor | None, spans: Spans, past: int, length: int, device: torch.device
) -> tuple[Tensor | None, bool]:
    """The mask of the decoder's self-attention, and whether it is just causal."""
    if mask is not None and mask.dim() == 4:
        return mask, False
    total = past + length
    if all(span == (0, total) for span in spans):
        if length == 1 or not past:
            return None, length > 1
        causal = torch.ones(length, total, dtype=torch.bool, device=device).tril(past)
        return causal, False
    keys = torch.arange(total, device=device)
    queries = keys[past:, None]
    first, stop = torch.tensor(spans, device=device)[:, :, None, None].unbind(1)
    real = (keys >= first) & (keys < stop) & (keys <= queries)
    # Padding attends to itself alone: a row without any key would be no number.
    return (real | (keys == queries))[:, None], False


def _in_window(
    mask_and_causal: tuple[Tensor | None, bool], window: int, past: int, states: Tensor
) -> tuple[Tensor | None, bool]:
    """The mask of layers whose positions attend to the last `window` tokens, their own included,
    and whether it is just causal."""
    mask, total = mask_and_causal[0], past + states.size(1)
    if total <= window:
        return mask_and_causal
    keys = torch.arange(total, device=states.device)
    queries = keys[past:, None]
    near = (keys > queries - window) & (keys <= queries)
    if mask is None:
        return near, False
    if mask.dtype == torch.bool:
        return mask & near, False
    return mask.masked_fill(~near, torch.finfo(mask.dtype).min), False


def _given(plan: ChunkPlan, retrieved: Tensor, shape: tuple[int, int]) -> Tensor:
    """The given neighbors of the plan's chunks, `[N, K, R]`."""
    expected = [plan.batch_size, plan.most, *shape]
    fits = retrieved.dim() == 4 and list(retrieved.shape[2:]) == expected[2:]
    if not fits or retrieved.size(0) != plan.batch_size or retrieved.size(1) < plan.most:
        raise ValueError(
            f"retrieved_input_ids has shape {list(retrieved.shape)}, expected {expected}: batch, "
            "chunks that the pass completes, neighbors, tokens of each"
        )
    if len(plan) < retrieved.size(0) * retrieved.size(1):
        left = torch.ones(retrieved.shape[:2], dtype=torch.bool)
        left[plan.rows, plan.places] = False
        _require_missing(retrieved[left.to(retrieved.device)], "these chunks are not complete")
    return retrieved[plan.rows, plan.places]


def _require_missing(retrieved: Tensor | None, why: str) -> None:
    if retrieved is not None and bool((retrieved >= 0).any()):
        raise ValueError(f"retrieved_input_ids has neighbors that nothing attends to: {why}")
