"""The tensors of a Hugging Face directory: those that transformers reads, and no others.

The first of these that is there is read, as by transformers 5:

    the file that config.json's `transformers_weights` names
    model.safetensors
    model.safetensors.index.json          and the shards that it names
    pytorch_model.bin
    pytorch_model.bin.index.json          and the shards that it names

Other files beside them (adapter_model.*, consolidated.*, a stale index) are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from retro_mcore.checkpoint.conversion.weights import Weight
from retro_mcore.checkpoint.safe_loading import load_torch_file
from retro_mcore.errors import CheckpointError
from retro_mcore.gguf_file import is_gguf
from retro_mcore.json_text import JsonError, parse_json

_CANDIDATES = ("model.safetensors", "model.safetensors.index.json",
               "pytorch_model.bin", "pytorch_model.bin.index.json")  # fmt: skip
_PREFIXES = ("transformer.", "model.", "gpt_neox.")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FLOATS = tuple(_DTYPES.values())
_QUANTIZED = (".qweight", ".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_scale_inv",
              ".weight_packed", ".SCB", ".absmax", ".quant_map", "quant_state", ".weight_format",
              ".input_scale", ".codebooks")  # fmt: skip
_SHOWN = 4  # names in one message


def refuse(directory: Path, found: str, expected: str) -> CheckpointError:
    """The error about a model: what it is or has, and what was expected."""
    kind = "GGUF" if is_gguf(directory) else "Hugging Face"
    return CheckpointError(directory, f"{kind} model with {found}", f"Expected {expected}")


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        value = parse_json(path.read_bytes(), unique_keys=True)
    except OSError as error:
        raise CheckpointError(
            path, f"cannot be read ({error.strerror})", "Copy it again"
        ) from error
    except JsonError as error:
        raise CheckpointError(path, str(error), "Download the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(path, f"holds a {type(value).__name__}", "Expected a JSON object")
    return value


def end_tokens(directory: Path, config: Mapping[str, Any]) -> list[int]:
    """Tokens that end a generated text, as transformers' `generate` takes them.

    Those of generation_config.json. A list in config.json counts where that file is missing; a
    single token there may be a family's default.

    Args:
        directory: The model's directory.
        config: Content of config.json.

    Raises:
        CheckpointError: generation_config.json cannot be read.
    """
    file, found = directory / "generation_config.json", config.get("eos_token_id")
    if file.is_file():
        found = read_json_object(file).get("eos_token_id")
        found = [found] if isinstance(found, int) else found
    tokens = found if isinstance(found, list) else []
    plain = (each for each in tokens if isinstance(each, int) and not isinstance(each, bool))
    return list(dict.fromkeys(each for each in plain if each >= 0))


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        name: As stored.
        shape: Of the tensor that `load` gives.
        dtype: Of that tensor; a string names a kind that holds no plain weights.
        load: Reads it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    load: Callable[[], Tensor]


class TensorFiles:
    """The tensors of a model, by Hugging Face's names without the base model's prefix.

    What is asked for and not there, or of another shape, is collected: `check` tells it together.

    Args:
        source: The model's directory or file, for errors.
        stored: Its tensors by name.
    """

    def __init__(self, source: Path, stored: Mapping[str, Stored]) -> None:
        self._directory, self._stored = source, stored
        self._taken: set[str] = set()
        self._missing: list[str] = []
        self._misshapen: list[str] = []

    @classmethod
    def of_directory(cls, directory: Path, config: Mapping[str, Any]) -> TensorFiles:
        """The tensors of a Hugging Face directory.

        Raises:
            CheckpointError: no file of weights, one that is missing or damaged, or an index that
                leads out of the directory.
        """
        found: dict[str, Stored] = {}
        for file in _files(directory, config):
            if not _is_file(file):
                name = _listed([file.name])
                raise refuse(directory, f"no {name}", "every file that its index names")
            read = _read_safetensors if file.suffix == ".safetensors" else _read_bin
            names = set()
            for stored in read(file):
                name = _base_name(stored.name)
                if name in names:
                    raise refuse(directory, f"two tensors {name} in {file.name}", "one")
                names.add(name)
                found[name] = stored  # of several shards the last counts, as there
        return cls(directory, found)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def take(
        self, shapes: Mapping[str, tuple[int, ...]], build: Callable[..., Tensor] | None = None
    ) -> Weight:
        """The weight that `build` (default: itself) makes of the named tensors, in their order.

        Args:
            shapes: The tensors, and the shapes that the model's configuration gives them.
            build: From the tensors to the weight.
        """
        parts = [part for name, shape in shapes.items() if (part := self._part(name, shape))]
        if len(parts) < len(shapes):
            return Weight((), torch.float32, _never)
        meta = [torch.empty(p.shape, dtype=_read_as(p.dtype), device="meta") for p in parts]
        made = build(*meta) if build else meta[0]
        return Weight(tuple(made.shape), made.dtype, partial(_build, parts, build))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
        return {name: stored.shape for name, stored in self._stored.items()}

    def unstack(self, name: str) -> None:
        """Replace a tensor by the rows of its first dimension, `NAME.0`, `NAME.1`, ..."""
        stacked = self._stored.get(name)
        if stacked is None or not stacked.shape:
            return
        rows = {
            f"{name}.{row}": Stored(
                f"{name}.{row}", stacked.shape[1:], stacked.dtype, partial(_load_row, stacked, row)
            )
            for row in range(stacked.shape[0])
        }
        others = {other: stored for other, stored in self._stored.items() if other != name}
        self._stored = {**others, **rows}

    def load(self, name: str) -> Tensor:
        """A tensor by itself."""
        return self._stored[name].load()

    def _part(self, name: str, shape: tuple[int, ...]) -> Stored | None:
        stored = self._stored.get(name)
        if stored is None:
            self._missing.append(name)
            return None
        self._taken.add(name)
        if isinstance(stored.dtype, str):
            raise self._quantized(f"{name} of type {stored.dtype}")
        if stored.shape != shape:
            found = f"{name} is {_sizes(stored.shape)}, not {_sizes(shape)}"
            self._misshapen.append(found)
            return None
        return stored

    @property
    def has_problems(self) -> bool:
        """Whether so much was missing that it need not be asked for more."""
        return len(self._missing) + len(self._misshapen) > 2 * _SHOWN

    def check(self, ignored: Callable[[str], bool]) -> None:
        """Refuse what was missing or misshapen, and tensors that nothing took.

        Args:
            ignored: Whether a tensor is no weight (a buffer of older releases).

        Raises:
            CheckpointError: naming tensors.
        """
        left = [n for n in sorted(self._stored.keys() - self._taken) if not ignored(n)]
        quantized = [name for name in left if name.endswith(_QUANTIZED)]
        if quantized:
            raise self._quantized(f"tensors {_listed(quantized)}")
        if self._missing:
            raise refuse(self._directory, f"no tensor {_listed(self._missing)}", "the whole model")
        says = "metadata" if is_gguf(self._directory) else "config.json"
        if self._misshapen:
            raise refuse(
                self._directory,
                f"tensors of other sizes than its {says} says: {_listed(self._misshapen)}",
                f"the {says} that belongs to these weights",
            )
        if left:
            raise refuse(self._directory, f"unknown tensors {_listed(left)}", "none")

    def _quantized(self, found: str) -> CheckpointError:
        return refuse(
            self._directory,
            f"{found}: a quantized model",
            "plain weights (float32, float16 or bfloat16): dequantize it, or take the model that "
            "it was made from",
        )


def _files(directory: Path, config: Mapping[str, Any]) -> list[Path]:
    explicit = config.get("transformers_weights")
    if explicit is not None:
        if not isinstance(explicit, str) or not explicit.endswith((".safetensors", ".json")):
            raise refuse(directory, f"transformers_weights {explicit!r}", "a *.safetensors file")
        path = _inside(directory, explicit)
        found = path if _is_file(path) else None
    else:
        found = next((directory / n for n in _CANDIDATES if _is_file(directory / n)), None)
    if found is None:
        raise _no_weights(directory)
    if found.suffix != ".json":
        return [found]
    weight_map = read_json_object(found).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(found, "has no weight_map", "Download the file again")
    names = weight_map.values()
    if not all(isinstance(name, str) and name.endswith((".safetensors", ".bin")) for name in names):
        raise CheckpointError(
            found, "names files that hold no weights", "Expected *.safetensors or *.bin"
        )
    return [_inside(directory, name) for name in sorted(set(names))]


def _inside(directory: Path, name: str) -> Path:
    """A file below the directory; a link there may lead elsewhere, as in a download cache."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise refuse(directory, f"a file of weights {name!r}, outside of it", "files inside")
    return directory / path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _no_weights(directory: Path) -> CheckpointError:
    suffixes = (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".pth", ".pt")
    there = sorted(path.name for path in directory.iterdir() if path.suffix in suffixes)
    beside = f" (only {_listed(there)})" if there else ""
    return refuse(
        directory,
        f"none of the files {', '.join(_CANDIDATES)}{beside}",
        "the files that transformers reads. Where it can read the model, "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIR) writes them",
    )


def _read_safetensors(file: Path) -> Iterator[Stored]:
    with _open(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118 (no mapping)
            part = tensors.get_slice(name)
            kind = part.get_dtype()
            load = partial(_load_safetensors, file, name)
            yield Stored(name, tuple(part.get_shape()), _DTYPES.get(kind, kind), load)


def _load_safetensors(file: Path, name: str) -> Tensor:
    with _open(file) as tensors:
        return tensors.get_tensor(name)


def _load_row(stacked: Stored, row: int) -> Tensor:
    """A row of a tensor; of a safetensors file only these bytes are read."""
    load: Any = stacked.load
    if getattr(load, "func", None) is not _load_safetensors:
        return stacked.load()[row]
    file, name = load.args
    with _open(file) as tensors:
        return tensors.get_slice(name)[row]


def _open(file: Path) -> Any:
    import safetensors

    try:
        return safetensors.safe_open(file, "pt")
    except Exception as error:  # its own kinds, for a damaged file
        raise CheckpointError(file, f"cannot be read ({error})", "Download it again") from error


def _read_bin(file: Path) -> Iterator[Stored]:
    with file.open("rb") as stream:
        if stream.read(2) not in (b"PK", b"\x80\x02"):  # zip archives, and pickles before torch 1.6
            raise CheckpointError(
                file,
                "is not a PyTorch file",
                "Download it again (with Git LFS, if it came by Git)",
            )
    state = load_torch_file(file, file, mapped=True)
    if not isinstance(state, Mapping):
        raise CheckpointError(file, f"holds a {type(state).__name__}", "Expected named tensors")
    for name, tensor in state.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not isinstance(name, str) or not plain:
            raise CheckpointError(
                file, f"holds {name!r}, which is not a plain tensor", "Expected named tensors"
            )
        dtype = tensor.dtype if tensor.dtype in _FLOATS else str(tensor.dtype)
        yield Stored(name, tuple(tensor.shape), dtype, partial(_detached, tensor))


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _build(parts: list[Stored], build: Callable[..., Tensor] | None) -> Tensor:
    read = [part.load() for part in parts]
    # Nothing here computes in double precision.
    read = [tensor.to(_read_as(tensor.dtype)) for tensor in read]
    return build(*read) if build else read[0]


def _read_as(dtype: torch.dtype | str) -> torch.dtype:
    kept = isinstance(dtype, torch.dtype) and dtype != torch.float64
    return dtype if kept else torch.float32  # type: ignore[return-value]


def _never() -> Tensor:
    raise AssertionError("a missing tensor is refused before it is read")


def _base_name(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    # On one line, whatever a stranger calls his tensors.
    return ", ".join(json.dumps(name)[1:-1][:120] for name in names[:_SHOWN]) + more


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"
