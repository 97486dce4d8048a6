"""RetroForCausalLM in the tools that people use, and where retro-mcore is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.unit.huggingface.models import pair
from tests.unit.huggingface.test_generation import Source, prompts, retriever, their_tokens
from tests.unit.huggingface.test_model import sample, small_model

ROPE = {"position_embedding_type": "rope"}
#: Without the letters that the `Letters` of our adapter leaves out.
PAIRS = [("Hello there, sir", " friend of old"), ("ab", "c"), ("Abc " * 8, "again and so")]


def run_alone(folder, *arguments):
    """Run alone.py with all installed packages except retro-mcore and megatron-core."""
    packages = folder / "packages"
    packages.mkdir()
    hidden = ("megatron", "retro_mcore", "__editable__")
    for entry in {path for path in map(Path, sys.path) if any(path.glob("*.dist-info"))}:
        for item in entry.iterdir():
            place = packages / item.name
            if not item.name.startswith(hidden) and not place.exists():
                place.symlink_to(item)
    environment = {
        **os.environ, "PYTHONPATH": str(packages), "HF_MODULES_CACHE": str(folder / "modules"),
    }  # fmt: skip
    script = Path(__file__).with_name("alone.py")
    command = [sys.executable, "-S", str(script), *map(str, arguments)]  # -S: no site-packages
    subprocess.run(command, check=True, cwd=folder, env=environment)


@pytest.mark.slow
def test_where_neither_retro_mcore_nor_megatron_is_installed(megatron, tmp_path, monkeypatch):
    """Logits, greedy tokens, saving, `Trainer`, a LoRA step, and our adapter's lm_eval scores."""
    from tests.unit.huggingface.test_conversion import exported, loaded

    ours = exported(tmp_path / "hf", ROPE)
    letters().save_pretrained(tmp_path / "hf")
    model, inputs = loaded(tmp_path / "hf", dtype=torch.float64), sample()
    table = torch.randint(-1, 90, (7, 2, 16))
    torch.save({**inputs, "table": table, "pairs": PAIRS}, tmp_path / "inputs")
    run_alone(tmp_path, *(tmp_path / name for name in ("hf", "inputs", "outputs")))
    found = torch.load(tmp_path / "outputs")
    with torch.no_grad():
        wanted = model(**inputs).logits
    torch.testing.assert_close(found["logits"], wanted, atol=1e-10, rtol=0)
    by_sum = {"retriever": lambda chunks: table[chunks.sum(1) % len(table)]}
    text = inputs["input_ids"][0, :11].tolist()
    assert found["new"][0, 11:].tolist() == their_tokens(model, [text], new=9, **by_sum)[0]
    again = tmp_path / "hf-again"
    assert (again / "modeling_retro.py").is_file()
    assert len(list(again.glob("model-*.safetensors"))) > 1
    assert _read(again) == _read(tmp_path / "hf")
    reloaded = loaded(again, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**inputs).logits, wanted)
    for name in ("trainer", "lora"):
        if name in found:
            assert found[name][-1] < found[name][0], name
    if "scores" in found:
        assert_same_scores(our_scores(ours, monkeypatch), found["scores"])


def _read(directory):
    """The options of a directory, and its weights as bytes."""
    from retro_mcore.checkpoint.conversion.formats import open_checkpoint

    checkpoint = open_checkpoint(directory)
    weights = {name: w.load().numpy().tobytes() for name, w in checkpoint.weights.items()}
    return checkpoint.flags, weights


@pytest.mark.slow
def test_trainer_lowers_the_loss(megatron, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate, an optional package, is not installed")
    from transformers import Trainer, TrainingArguments

    model, inputs = small_model(**ROPE, init_method_std=0.02).float(), sample(batch_size=8)
    rows = [
        {"labels": tokens, "input_ids": tokens, "retrieved_input_ids": neighbors}
        for tokens, neighbors in zip(*inputs.values(), strict=True)
    ]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2,
        gradient_accumulation_steps=2, gradient_checkpointing=True, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_layers_spread_by_a_device_map(megatron, tmp_path):
    """Some layers are read from disk when they run: accelerate moves what goes in and out."""
    pytest.importorskip("accelerate", reason="accelerate, an optional package, is not installed")
    from tests.unit.huggingface.test_conversion import exported, loaded

    exported(tmp_path / "hf", ROPE, dtype=torch.float32)
    inputs = sample()
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{n}": "disk" if n else "cpu" for n in range(4)}
    places |= {"model.encoder.layers.0": "disk", "model.encoder.layers.1": "cpu"}
    spread = loaded(tmp_path / "hf", device_map=places, offload_folder=str(tmp_path / "off"))
    with torch.no_grad():
        wanted = loaded(tmp_path / "hf")(**inputs).logits
        torch.testing.assert_close(spread(**inputs).logits, wanted)


@pytest.mark.slow
def test_a_lora_step(megatron):
    peft = pytest.importorskip("peft", reason="peft, an optional package, is not installed")
    model, inputs = small_model(**ROPE), sample()
    before = model(**inputs).logits
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0
    )
    tuned = peft.get_peft_model(model, settings)
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert any("cross_attn" in name for name in trained)
    assert any("encoder" in name for name in trained)
    optimizer = torch.optim.SGD((p for p in tuned.parameters() if p.requires_grad), lr=0.1)
    losses = []
    for _ in range(3):
        loss = tuned(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with tuned.disable_adapter():
        torch.testing.assert_close(tuned(**inputs).logits, before)
    prompt = inputs["input_ids"][:1]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 3}
    assert tuned.generate(input_ids=prompt, retriever=retriever, **options).size(1) == 35


def letters():
    """A tokenizer of transformers with the tokens of `tests.unit.evaluation.loaded.Letters`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<eod>": 0, "<bos>": 1} | {chr(token + 30): token for token in range(2, 90)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eod>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eod>")


@pytest.mark.slow
@pytest.mark.parametrize("retro_neighbors", ["none", "live"])
def test_lm_eval_scores_as_our_adapter_does(megatron, monkeypatch, retro_neighbors):
    pytest.importorskip("accelerate", reason="accelerate, an optional package, is not installed")
    harness = pytest.importorskip(
        "lm_eval.models.huggingface", reason="lm_eval, an optional package, is not installed"
    )
    ours, theirs = pair(**ROPE)
    if retro_neighbors == "live":
        theirs.retriever = retriever
    model = harness.HFLM(pretrained=theirs, tokenizer=letters(), device="cpu", batch_size=2)
    asked = [SimpleNamespace(args=each) for each in PAIRS]
    found = model.loglikelihood(asked, disable_tqdm=True)
    assert_same_scores(our_scores(ours, monkeypatch, retro_neighbors), found)


def our_scores(model, monkeypatch, retro_neighbors="none"):
    """Scores of our adapter."""
    from retro_mcore import session
    from retro_mcore.evaluation.lm_eval import RetroLM
    from tests.unit.evaluation.loaded import loaded_model

    loaded = loaded_model(retro_neighbors == "live", model)
    monkeypatch.setattr(session, "load_model", lambda *args, **kwargs: loaded)
    adapter = RetroLM("project", "model", retro_neighbors=retro_neighbors, device="cpu")
    if retro_neighbors == "live":
        monkeypatch.setattr(loaded.retriever, "neighbors_of", Source().neighbors_of)
    return adapter.loglikelihood([SimpleNamespace(args=each) for each in PAIRS])


def assert_same_scores(wanted, found):
    for (likelihood, greedy), (likelihood_there, greedy_there) in zip(wanted, found, strict=True):
        assert likelihood == pytest.approx(likelihood_there, abs=1e-4)
        assert greedy == greedy_there


@pytest.mark.slow
def test_a_projects_retriever(megatron):
    """As the model calls it, what the project's live search finds."""
    from retro_mcore import project_retriever
    from retro_mcore.errors import ConfigurationError
    from retro_mcore.retrieval.retriever import Retriever
    from tests.unit.data.projects import built_project

    directory = built_project()
    model = small_model(vocab_size=512, retro_chunk_length=16, max_position_embeddings=128)
    function = project_retriever(directory, model.config, device="cpu")
    chunks = torch.randint(5, 400, (3, 16))
    wanted = Retriever(directory, 2, 2, "cpu").search_tokens(chunks.tolist())
    found = function(chunks)
    assert found.shape == (3, 2, 32)
    assert torch.equal(found < 0, torch.from_numpy(wanted.mask))
    assert torch.equal(found[found >= 0], torch.from_numpy(wanted.tokens).long()[found >= 0])
    assert len(their_tokens(model, prompts(18), new=4, retriever=function)[0]) == 4
    with pytest.raises(ConfigurationError, match="chunks of 16 tokens, and the model's have 8"):
        project_retriever(directory, small_model().config)
