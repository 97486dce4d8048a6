"""Retro in plain torch, one sample and one chunk at a time: slow, short, obviously right.

Reads the weights of `RetroModel.state_dict()` and the fields of its config; knows no megatron.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class RetroReference:
    """`RetroReference(config, state_dict, ...).logits(tokens, retrieved, mask)`."""

    def __init__(self, config, weights, rotary_percent=1.0, rotary_base=10000, rope=False):
        self.config, self.weights, self.rope = config, weights, rope
        self.encoder = config.encoder_config()  # sizes of the neighbor encoder
        self.rotary_percent, self.rotary_base = rotary_percent, rotary_base

    def logits(self, tokens_S: Tensor, retrieved_LKR: Tensor | None, mask_LKR: Tensor | None):
        """`[S, V]`; mask True = padding. `retrieved` None: the GPT decoder."""
        config = self.config
        hidden, encoded = self.embed(tokens_S), None
        for number in range(1, config.num_layers + 1):
            name = f"decoder.layers.{number - 1}."
            attended = self.self_attention(hidden, name, causal=True, rope=self.rope)
            hidden = self.add(hidden, attended, name, "self_attn_bda.")
            if number in config.retro_layer_numbers and retrieved_LKR is not None:
                normed = self.norm(hidden, name + "pre_cross_attn_layernorm.")
                if encoded is None:
                    encoded = self.encode_all(retrieved_LKR, mask_LKR, normed)
                attended, attends_S = self.chunked_cross_attention(normed, encoded, mask_LKR, name)
                attended = config.retro_attention_gate * attended
                if attends_S.any():
                    added = self.add(hidden, attended, name, "cross_attn_bda.")
                    hidden = torch.where(attends_S[:, None], added, hidden)
            hidden = self.add(hidden, self.mlp(hidden, name), name, "mlp_bda.")
        if config.retro_final_layernorm:
            hidden = self.norm(hidden, "decoder.final_layernorm.")
        output = self.weights.get("output_layer.weight")
        return (
            hidden
            @ (self.weights["embedding.word_embeddings.weight"] if output is None else output).T
        )

    def encode_all(self, retrieved_LKR, mask_LKR, normed_SD):
        """Every neighbor, encoded with the chunk that retrieved it: a list [L][K] of `[R, D]`."""
        return [
            [
                self.encode(tokens_R, None if mask_LKR is None else mask_LKR[chunk, k], chunk_MD)
                for k, tokens_R in enumerate(retrieved_LKR[chunk])
            ]
            for chunk, chunk_MD in enumerate(self.chunks(normed_SD))
        ]

    def encode(self, tokens_R, mask_R, chunk_MD):
        hidden = self.embed(tokens_R)
        if self.config.retro_encoder_input == "normed":
            mean_square = (hidden**2).mean(-1, keepdim=True)
            hidden = hidden / (mean_square + self.config.layernorm_epsilon).sqrt()
        if self.encoder.hidden_size != self.config.hidden_size:
            hidden = self.linear(hidden, "neighbor_encoder.input_projection.")
        rope = self.rope and self.config.retro_encoder_positions
        for layer in range(self.config.retro_encoder_num_layers):
            name = f"neighbor_encoder.layers.{layer}."
            attended = self.self_attention(hidden, name, rope=rope, mask=mask_R)
            hidden = self.add(hidden, attended, name, "self_attn_bda.")
            if layer == 0:
                normed = self.norm(hidden, name + "pre_cross_attn_layernorm.")
                residual = normed if self.config.retro_encoder_residual == "normed" else hidden
                attended = self.cross_attention(normed, chunk_MD, None, name)
                hidden = self.add(residual, attended, name, "cross_attn_bda.")
            hidden = self.add(hidden, self.mlp(hidden, name), name, "mlp_bda.")
        return hidden

    def chunks(self, states_SD):
        """The M tokens of each chunk; a right-aligned grid's first one is zero-padded."""
        length = self.config.retro_chunk_length
        if self.config.retro_chunk_alignment == "left":
            return [c for c in states_SD.split(length) if len(c) == length]
        first = len(states_SD) % length
        head = [F.pad(states_SD[:first], (0, 0, 0, length - first))] if first else []
        return head + [c for c in states_SD[first:].split(length) if len(c)]

    def chunked_cross_attention(self, normed_SD, encoded, mask_LKR, name):
        """What each position gets, and which ones attend."""
        length, output = self.config.retro_chunk_length, torch.zeros_like(normed_SD)
        attends = torch.zeros(len(normed_SD), dtype=torch.bool)
        left = self.config.retro_chunk_alignment == "left"
        start = length - 1 if left else (len(normed_SD) - 1) % length
        for chunk, neighbors_KRD in enumerate(encoded):
            here = slice(start + chunk * length, start + (chunk + 1) * length)
            mask = None if mask_LKR is None else mask_LKR[chunk].flatten()
            if mask is None or not mask.all():
                states = torch.cat(neighbors_KRD)
                output[here] = self.cross_attention(
                    normed_SD[here], states, mask, name, first=length - 1
                )
                attends[here] = True
        return output, attends

    def cross_attention(self, normed, states, mask, name, first=0):
        channels, name = self.sizes(name).kv_channels, name + "cross_attention."
        query = self.linear(normed, name + "linear_q.").unflatten(-1, (-1, channels))
        key_value = self.linear(states, name + "linear_kv.")
        key, value = key_value.unflatten(-1, (-1, 2, channels)).unbind(-2)
        if first and self.config.retro_cross_attention_keys != "own":
            before = self.keys_before(key, mask)
            mixed = self.config.retro_cross_attention_keys == "mixed"
            own = [mixed and group % 4 == 1 for group in range(key.size(1))]
            key = torch.where(torch.tensor(own)[None, :, None], key, before)
        if self.config.retro_cross_attention_positions == "rotary":
            # Each neighbor's tokens count from 0, as do those of a chunk.
            length = self.config.retro_retrieved_length if first else len(key)
            key = torch.cat([self.rotate(part, whole=True) for part in key.split(length)])
            query = self.rotate(query, first, whole=True)
        return self.linear(self.attend(query, key, value, mask), name + "linear_proj.")

    def keys_before(self, key, mask):
        """Of the token before in the same neighbor, unless that is padding or there is none."""
        rows = []
        for place in range(len(key)):
            first = place % self.config.retro_retrieved_length == 0
            own = first or (mask is not None and bool(mask[place - 1]))
            rows.append(key[place if own else place - 1])
        return torch.stack(rows)

    def self_attention(self, hidden, name, causal=False, rope=False, mask=None):
        channels, groups = self.sizes(name).kv_channels, self.sizes(name).num_query_groups
        normed, name = self.norm(hidden, name + "input_layernorm."), name + "self_attention."
        qkv = self.linear(normed, name + "linear_qkv.").unflatten(-1, (groups, -1, channels))
        query, key, value = qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]
        if rope:
            query, key = self.rotate(query), self.rotate(key)
        if causal:
            mask = torch.ones(len(hidden), len(hidden)).triu(1).bool()
        elif mask is not None and mask.all():
            mask = None  # nobody looks at a missing neighbor
        return self.linear(self.attend(query, key, value, mask), name + "linear_proj.")

    def sizes(self, name):
        return self.encoder if name.startswith("neighbor_encoder.") else self.config

    def attend(self, query, key, value, mask):
        repeat = query.size(1) // key.size(1)
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        scores = torch.einsum("qhc,khc->hqk", query, key) / query.size(-1) ** 0.5
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        return torch.einsum("hqk,khc->qhc", scores.softmax(-1), value).flatten(1)

    def rotate(self, states, first=0, whole=False):
        """Rotary embedding of `[S, heads, C]` from position `first` on."""
        size = states.size(-1) if whole else int(states.size(-1) * self.rotary_percent)
        frequencies = self.rotary_base ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
        positions = torch.arange(first, first + len(states)).float()
        angles = torch.outer(positions, frequencies).repeat(1, 2)[:, None]
        rotated, rest = states[..., :size], states[..., size:]
        half = torch.cat((-rotated[..., size // 2 :], rotated[..., : size // 2]), -1)
        cosine, sine = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
        return torch.cat((rotated * cosine + half * sine, rest), -1)

    def mlp(self, hidden, name):
        normed = self.norm(hidden, name + "pre_mlp_layernorm.")
        inner = self.linear(normed, name + "mlp.linear_fc1.")
        if self.config.gated_linear_unit:
            gate, up = inner.chunk(2, -1)
            inner = self.config.activation_func(gate) * up
        else:
            inner = self.config.activation_func(inner)
        return self.linear(inner, name + "mlp.linear_fc2.")

    def embed(self, tokens):
        states = self.weights["embedding.word_embeddings.weight"][tokens]
        positions = self.weights.get("embedding.position_embeddings.weight")
        return states if positions is None else states + positions[: len(tokens)]

    def linear(self, states, name):
        return F.linear(states, self.weights[name + "weight"], self.weights.get(name + "bias"))

    def add(self, residual, update, name, sublayer):
        """x + f(Norm(x)), or DeepNorm's Norm(alpha * x + f(x))."""
        alpha = self.sizes(name).deepnorm_alpha
        total = alpha * residual + update
        return self.norm(total, f"{name}{sublayer}norm.")

    def norm(self, states, name):
        if name + "weight" not in self.weights:
            return states  # before a sublayer under DeepNorm, after it without
        weight, bias = self.weights[name + "weight"], self.weights.get(name + "bias")
        weight = weight + 1 if self.config.layernorm_zero_centered_gamma else weight
        epsilon = self.config.layernorm_epsilon
        if self.config.normalization == "RMSNorm":
            return F.rms_norm(states, weight.shape, weight, epsilon)
        return F.layer_norm(states, weight.shape, weight, bias, epsilon)
