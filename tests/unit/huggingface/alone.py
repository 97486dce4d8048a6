"""What a user does with a saved model where neither retro-mcore nor megatron-core is installed.

    python alone.py DIRECTORY INPUTS OUTPUTS

INPUTS and OUTPUTS are files of `torch.save`. Tools that are not installed are left out.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def main(directory: str, inputs: str, outputs: str) -> None:
    assert find_spec("retro_mcore") is None
    assert find_spec("megatron") is None
    assert AutoConfig.from_pretrained(directory, trust_remote_code=True).model_type == "retro"
    given = torch.load(inputs)
    table, pairs = given.pop("table"), given.pop("pairs")
    model = load(directory, dtype=torch.float64)
    with torch.no_grad():
        logits = model(**given).logits
    new = model.generate(
        given["input_ids"][:1, :11], max_new_tokens=9, do_sample=False, eos_token_id=90,
        pad_token_id=0, retriever=lambda chunks: table[chunks.sum(1) % len(table)],
    )  # fmt: skip
    model.save_pretrained(directory + "-again", max_shard_size="20KB")
    found: dict[str, Any] = {"logits": logits, "new": new}
    if find_spec("accelerate") is not None:
        found["trainer"] = train(directory, given, outputs + "-trainer")
        if find_spec("lm_eval") is not None:
            found["scores"] = score(directory, pairs)
    if find_spec("peft") is not None:
        found["lora"] = tune(directory, given)
    torch.save(found, outputs)


def load(directory: str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options)


def score(directory: str, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Scores of `lm_eval --model hf`."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=directory, trust_remote_code=True, device="cpu", batch_size=2)
    asked: Any = [SimpleNamespace(args=each) for each in pairs]
    return model.loglikelihood(asked, disable_tqdm=True)


def tune(directory: str, inputs: dict[str, torch.Tensor]) -> list[float]:
    """Losses of steps with PEFT's LoRA."""
    import peft

    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0
    )
    model = peft.get_peft_model(load(directory), settings).train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(directory: str, inputs: dict[str, torch.Tensor], folder: str) -> list[float]:
    """Losses of steps of transformers' Trainer."""
    from transformers import Trainer, TrainingArguments

    rows: Any = [
        {"labels": tokens, "input_ids": tokens, "retrieved_input_ids": neighbors}
        for tokens, neighbors in zip(*inputs.values(), strict=True)
    ]
    arguments = TrainingArguments(
        folder, max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(load(directory), arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(*sys.argv[1:])
