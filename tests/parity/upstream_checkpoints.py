"""Checkpoints that the retired Retro writes and reads: `python … write FOLDER` or `… read FOLDER`.

Runs where megatron-core 0.15.3 shadows ours (environment.py). What it writes is what Megatron-LM
0.15.3 wrote with --ckpt-format torch_dist and torch: the model's own state dicts beside its
arguments, enumerations among them.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from tests.parity.cases import CASES, VOCABULARY, Case
from tests.parity.oracle import build_retired_model, randomize
from tests.processes import join_megatron, run_ranks

NAMES = ("base", "llama_ragged", "18_layers")
FORMS = ("torch_dist", "torch", "torch TP2")


def chosen_cases() -> list[Case]:
    return [case for case in CASES if case.name in NAMES]


def arguments(case: Case, tensor_parallel_size: int) -> Namespace:
    """As Megatron-LM's, of what matters here."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    fields = case.config_fields()
    return Namespace(
        **{key: value for key, value in fields.items() if key not in ("activation_func",)},
        norm_epsilon=case.layernorm_epsilon,
        apply_layernorm_1p=False,
        swiglu=case.swiglu,
        group_query_attention=False,
        num_query_groups=1,
        seq_length=case.sequence_length,
        max_position_embeddings=64,
        position_embedding_type=case.position_embedding_type,
        rotary_percent=case.rotary_percent,
        rotary_base=case.rotary_base,
        untie_embeddings_and_output_weights=not case.tied,
        padded_vocab_size=VOCABULARY,
        tokenizer_type="GPTSentencePieceTokenizer",
        tensor_model_parallel_size=tensor_parallel_size,
        pipeline_model_parallel_size=1,
        params_dtype=torch.float32,
        retro_add_retriever=True,
        model_type=ModelType.encoder_or_decoder,
        attention_backend=AttnBackend.local,
        bias_gelu_fusion=False,
    )


def build(case: Case, **fields: Any) -> torch.nn.Module:
    model = build_retired_model({**case.config_fields(), **fields}, case.model_arguments())
    return model.eval()


def logits(model: torch.nn.Module, case: Case) -> torch.Tensor:
    inputs = {name: tensor for name, tensor in case.inputs().items() if name != "labels"}
    with torch.no_grad():
        return model(**inputs, attention_mask=None)


def write(folder: Path) -> None:
    """Every case in every form, and its logits."""
    from megatron.core import dist_checkpointing

    join_megatron()
    answers = {}
    for case in chosen_cases():
        torch.manual_seed(0)
        model = build(case)
        randomize(model)
        answers[case.name, "torch_dist"] = answers[case.name, "torch"] = logits(model, case)
        state = {"args": arguments(case, 1), "checkpoint_version": 3.0, "iteration": 7}
        path = folder / case.name / "torch_dist" / "iter_0000007"
        path.mkdir(parents=True)
        dist_checkpointing.save({**state, "model": model.sharded_state_dict()}, str(path))
        track(path)
        save_rank(folder / case.name / "torch", state, model, 0)
    torch.distributed.destroy_process_group()
    for number, answer in enumerate(run_ranks(2, write_tensor_parallel, str(folder))):
        for name, part in answer.items():
            key = name, "torch TP2"
            answers[key] = part if number == 0 else torch.cat([answers[key], part], -1)
    torch.save(answers, folder / "answers.pt")


def write_tensor_parallel(folder: str) -> dict[str, torch.Tensor]:
    """One file per rank, and this rank's part of the logits."""
    join_megatron(tensor_model_parallel_size=2)
    rank, answers = torch.distributed.get_rank(), {}
    for case in chosen_cases():
        torch.manual_seed(0)
        model = build(case, tensor_model_parallel_size=2)
        # Other weights than on the other rank where tensor parallelism cuts, the same elsewhere.
        randomize(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if getattr(parameter, "tensor_model_parallel", False):
                    parameter.mul_(1 + 0.1 * rank)
        answers[case.name] = logits(model, case)
        state = {"args": arguments(case, 2), "checkpoint_version": 3.0, "iteration": 7}
        save_rank(Path(folder) / case.name / "torch TP2", state, model, rank)
    return answers


def save_rank(folder: Path, state: dict[str, Any], model: torch.nn.Module, rank: int) -> None:
    file = folder / "iter_0000007" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    torch.save({**state, "model": model.state_dict_for_save_checkpoint()}, file)
    if rank == 0:
        track(file.parents[1])


def track(checkpoint: Path) -> None:
    (checkpoint.parent / "latest_checkpointed_iteration.txt").write_text("7")


def read(folder: Path) -> None:
    """The logits of what was converted to the forms of `FORMS`, loaded strictly."""
    from megatron.core import dist_checkpointing

    join_megatron()
    answers = {}
    for case in chosen_cases():
        model = build(case)
        path = folder / case.name / "megatron" / "iter_0000007"
        state = dist_checkpointing.load(
            {"model": model.sharded_state_dict()}, str(path), strict="raise_all"
        )
        model.load_state_dict(state["model"], strict=True)
        answers[case.name, "megatron"] = logits(model, case)
        model = build(case)
        file = folder / case.name / "megatron-torch" / "iter_0000007" / "mp_rank_00"
        state = torch.load(file / "model_optim_rng.pt", weights_only=False)
        missing, unexpected = model.load_state_dict(state["model"], strict=False)
        assert not unexpected
        assert all(name.endswith("_extra_state") for name in missing), missing
        answers[case.name, "megatron-torch"] = logits(model, case)
    torch.save(answers, folder / "read.pt")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
