"""Flags of the optimizers other than Adam."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

import tyro

from retro_mcore.errors import ConfigurationError, flag_of
from retro_mcore.model.option_traits import at_least

#: Optimizers that orthogonalize matrices.
MUON = ("muon", "dist_muon", "adaptive_muon")

#: Optimizers of matrices; AdamW trains all other weights.
MATRIX_OPTIMIZERS = (*MUON, "lion", "soap")

#: The optimizers that read each flag, by the beginning of its name.
_READERS = {
    "sgd_": ("sgd",),
    "muon_": MUON,
    "adaptive_muon_": ("adaptive_muon",),
    "lion_": ("lion",),
    "soap_": ("soap",),
}


@dataclass(kw_only=True)
class OtherOptimizerOptions:
    """SGD, Muon, Lion and SOAP, with Megatron's defaults except where stated."""

    sgd_momentum: float = 0.9
    """SGD's momentum."""
    muon_momentum: float = 0.9
    """Decay of Muon's momentum."""
    muon_no_split_qkv: bool = False
    """Orthogonalize the projection of queries, keys and values as one matrix."""
    muon_nesterov: Annotated[bool, tyro.conf.arg(aliases=("--muon-use-nesterov",))] = False
    """Use Nesterov momentum in Muon."""
    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = "spectral"
    """Scale of Muon's update, as a function of the matrix's shape."""
    muon_fp32_matmul_prec: Literal["medium", "high", "highest"] = "medium"
    """Precision of Muon's matrix products; medium: bfloat16."""
    muon_num_ns_steps: int = field(default=5, metadata=at_least(1))
    """Newton-Schulz steps."""
    muon_tp_mode: Literal["duplicated", "distributed", "blockwise"] = "duplicated"
    """How a divided matrix is orthogonalized: whole on each process (duplicated), whole in parts
    (distributed), or each process's part by itself (blockwise). Blockwise is another optimizer for
    each tensor parallel size, so a run must keep that size."""
    muon_extra_scale_factor: float = 1.0
    """Additional scale of Muon's update."""
    adaptive_muon_beta2: float = 0.95
    """Decay of the second moment of adaptive Muon (AdaMuon)."""
    adaptive_muon_eps: float = 1e-8
    """Epsilon of adaptive Muon."""
    lion_beta1: float = 0.95
    """Share of Lion's momentum in the update, before the new gradient."""
    lion_beta2: float = 0.98
    """Decay of Lion's momentum."""
    soap_shampoo_beta: float = 0.95
    """Decay of SOAP's two matrices of each weight matrix, whose eigenvectors Adam runs in."""
    soap_precondition_frequency: int = field(default=1, metadata=at_least(1))
    """Steps from one update of SOAP's eigenvectors to the next."""
    soap_no_kl_shampoo: bool = False
    """Average SOAP's matrices as in Shampoo, without KL-Shampoo's correction."""

    def check_optimizer(self) -> None:
        """Reject optimizers without support, and flags that the chosen one does not read.

        Raises:
            ConfigurationError: names the flag.
        """
        optimizer = self.optimizer  # type: ignore[attr-defined]
        known = ("adam", "sgd", *MATRIX_OPTIMIZERS)
        if optimizer not in known:
            raise ConfigurationError(
                "--optimizer",
                f"{optimizer}, which Megatron does not offer",
                f"Use {', '.join(known[:-1])} or {known[-1]}",
            )
        for problem in self._incompatible(optimizer):
            raise problem

    def _incompatible(self, optimizer: str) -> Iterator[ConfigurationError]:
        for each in fields(OtherOptimizerOptions):
            readers = next(who for prefix, who in _READERS.items() if each.name.startswith(prefix))
            if getattr(self, each.name) != each.default and optimizer not in readers:
                yield ConfigurationError(
                    flag_of(each.name),
                    f"given with --optimizer {optimizer}, which does not read it",
                    f"Add --optimizer {readers[0]}, or leave it out",
                )
        if optimizer == "adam":
            return
        for name in ("adam_beta1", "adam_beta2", "adam_eps") if optimizer == "sgd" else ():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                yield ConfigurationError(
                    flag_of(name),
                    f"given with --optimizer {optimizer}, which does not read it",
                    "Add --optimizer adam, or leave it out",
                )
        if optimizer in MATRIX_OPTIMIZERS and getattr(self, "loss_scale", None) is not None:
            yield ConfigurationError(
                "--loss-scale",
                f"given with --optimizer {optimizer}, which Megatron would scale in part only",
                "Leave it out",
            )
        for name in ("use_distributed_optimizer", "use_precision_aware_optimizer"):
            if getattr(self, name):
                yield ConfigurationError(
                    "--optimizer",
                    f"{optimizer} with {flag_of(name)}, which is made for Adam's state",
                    "Leave one of them out",
                )
        if getattr(self, "fp16", False) and optimizer in MATRIX_OPTIMIZERS:
            yield ConfigurationError(
                "--optimizer", f"{optimizer} with --fp16, which Megatron refuses", "Use --bf16"
            )
        if optimizer == "dist_muon" and not getattr(self, "bf16", False):
            yield ConfigurationError(
                "--optimizer",
                "dist_muon without --bf16, where Megatron cannot save its state",
                "Add --bf16, or use muon",
            )
        for name in ("tensor_model_parallel_size", "expert_tensor_parallel_size"):
            if optimizer == "soap" and getattr(self, name) not in (None, 1):
                yield ConfigurationError(
                    "--optimizer",
                    f"soap with {flag_of(name)} {getattr(self, name)}: Megatron's SOAP would "
                    "precondition each process's part of a matrix by itself",
                    "Divide over data, context, expert or pipeline parallel processes instead",
                )
