"""One side of `model_step.py`, in a process of its own: builds a model, answers on stdout.

The retired side runs where megatron-core 0.15.3 shadows ours. Commands come on stdin, one JSON
value a line; each is answered with one JSON line. A step is forward and backward, without the
optimizer, which is the same for all.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.peak_memory import peak_bytes


class Side:
    """A model and its batch.

    Args:
        kind: "retired", "ours", or "gpt" (the decoder of ours without retrieval).
        options: The fields of `model_step.Options`, and "hidden": the one size to build.
        weights: File of the retired model's weights: written by "retired", read by the others.
    """

    def __init__(self, kind: str, options: dict[str, Any], weights: str) -> None:
        self.kind, self.options = kind, options
        self.device = _join(options["device"])
        torch.manual_seed(0)
        self.model = self._build(weights).to(getattr(torch, options["dtype"])).to(self.device)
        self.batch = {name: tensor.to(self.device) for name, tensor in self._batch().items()}
        self.parameters = {
            parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()
        }

    def step(self, around_forward: Any = None) -> float:
        """Forward and backward; the loss."""
        self.model.zero_grad(set_to_none=True)
        with around_forward or nullcontext():
            loss = self.model(attention_mask=None, **self.batch).mean()
        loss.backward()
        return loss.item()

    def time(self) -> float:
        """Seconds of one step: of the processor on CPU, of the device's clock on CUDA."""
        if self.device.type == "cpu":
            start = time.process_time()
            self.step()
            return time.process_time() - start
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.step()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def peak_bytes(self) -> int:
        """Most memory that tensors take during a step, beyond what there is before it."""
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return torch.cuda.max_memory_allocated() - before
        return peak_bytes(self.step)

    def saved_bytes(self) -> int:
        """What the forward pass keeps for the backward pass: distinct storages, not parameters."""
        storages: dict[int, torch.UntypedStorage] = {}
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.parameters:
                storages[storage._cdata] = storage
            return tensor

        @contextmanager
        def counting() -> Iterator[None]:
            nonlocal total
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                yield
            # At the end of the forward pass: recomputation discards outputs after they are saved.
            total = sum(storage.nbytes() for storage in storages.values())
            storages.clear()

        self.step(counting())
        return total

    def flops(self) -> int:
        """Of the matrix products in a step; of attention also those hidden by a mask afterwards."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        # The counter knows matrix products, and not the CPU's fused attention.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.step()
        return counter.get_total_flops()

    def _build(self, weights: str) -> torch.nn.Module:
        fields, arguments = self._fields(), self._arguments()
        if self.kind == "retired":
            from tests.parity.oracle import build_retired_model

            model = build_retired_model(fields, arguments)
            state = {
                name: value for name, value in model.state_dict().items() if torch.is_tensor(value)
            }
            torch.save(state, weights)
            return model
        return _build_ours(self.kind, fields, arguments, torch.load(weights, weights_only=True))

    def _fields(self) -> dict[str, Any]:
        options, dtype = self.options, getattr(torch, self.options["dtype"])
        return {
            "num_layers": options["num_layers"],
            "hidden_size": options["hidden"],
            "num_attention_heads": options["hidden"] // options["head_channels"],
            "retro_chunk_length": options["chunk_length"],
            "retro_num_neighbors": options["neighbors"],
            "retro_num_retrieved_chunks": options["retrieved"] // options["chunk_length"],
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "retro_encoder_hidden_dropout": 0.0,
            "retro_encoder_attention_dropout": 0.0,
            "params_dtype": dtype,
            "bf16": dtype == torch.bfloat16,
        }

    def _arguments(self) -> dict[str, Any]:
        return {
            "vocab_size": self.options["vocab_size"],
            "max_sequence_length": max(self.options["seq_length"], self.options["retrieved"]),
            "share_embeddings_and_output_weights": True,
        }

    def _batch(self) -> dict[str, Tensor]:
        options = self.options
        generator = torch.Generator().manual_seed(1)
        text = (options["batch"], options["seq_length"])
        chunks = options["batch"] * options["seq_length"] // options["chunk_length"]
        retrieved = (chunks * options["neighbors"], options["retrieved"])

        def tokens(shape: tuple[int, int]) -> Tensor:
            return torch.randint(options["vocab_size"], shape, generator=generator)

        def positions(shape: tuple[int, int]) -> Tensor:
            return torch.arange(shape[1]).expand(shape).contiguous()

        batch = {"input_ids": tokens(text), "position_ids": positions(text), "labels": tokens(text)}
        if self.kind != "gpt":
            batch["context_input_ids"] = tokens(retrieved)
            batch["context_position_ids"] = positions(retrieved)
        return batch


def _build_ours(
    kind: str, fields: dict[str, Any], arguments: dict[str, Any], weights: dict[str, Tensor]
) -> torch.nn.Module:
    from retro_mcore import RetroConfig, RetroModel, get_retro_decoder_block_spec
    from retro_mcore.checkpoint.conversion import upstream
    from retro_mcore.model.decoder_model import DecoderModel
    from retro_mcore.model.specs import get_gpt_decoder_block_spec

    config = RetroConfig.from_upstream("mcore-0.15", **fields)
    retro = RetroModel(
        config=config, transformer_layer_spec=get_retro_decoder_block_spec(config), **arguments
    )
    upstream.load_state_dict(retro, weights)
    if kind == "ours":
        return retro
    spec = get_gpt_decoder_block_spec(config)
    spec.layer_norm = None  # as the retired decoder
    gpt = DecoderModel(config=config, transformer_layer_spec=spec, **arguments)
    missing, _ = gpt.load_state_dict(retro.state_dict(), strict=False)
    assert not [name for name in missing if not name.endswith("_extra_state")], missing
    return gpt


def _join(device: str) -> torch.device:
    """A world of one on the device, without parallelism."""
    from retro_mcore.platform import setup_device

    where = setup_device(device)  # type: ignore[arg-type]
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from retro_mcore.distributed import initialize

    initialize("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    return where


def main() -> None:
    """Build what the command line says, then answer commands until stdin closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    kind, options, weights = sys.argv[1:]
    if kind == "retired":
        from tests.parity.oracle import compile_nothing

        compile_nothing()
    side = Side(kind, json.loads(options), weights)
    commands: dict[str, Callable[[], float]] = {
        "loss": side.step,
        "time": side.time,
        "peak": side.peak_bytes,
        "saved": side.saved_bytes,
        "flops": side.flops,
    }
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(commands[json.loads(line)]()), file=answers, flush=True)


if __name__ == "__main__":
    main()
