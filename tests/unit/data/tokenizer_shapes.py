"""Small tokenizers of the shapes that real ones have, each in a directory of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXTS = ["The quick brown fox.", "for i in range(3):\n    print(i)", "Ünïcode, too: 漢字"]
BEGIN, END = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"


def byte_level(special: list[str], ordinary: list[str] = (), texts: list[str] = TEXTS) -> Any:
    """A byte-level BPE with added tokens, special and not, as Llama 3, Qwen, GPT-2 have it."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, 280)
    tokenizer._tokenizer.add_tokens([AddedToken(each, normalized=False) for each in ordinary])
    tokenizer._tokenizer.add_special_tokens(special)
    return tokenizer._tokenizer


def byte_fallback(special: list[str], ordinary: list[str] = (), prefix: bool = True) -> Any:
    """A BPE of characters and bytes, as Llama 2, Mistral and Gemma have it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    letters = sorted(set("".join(TEXTS)) - {"漢", "字", "ï"} | set("▁<>/[]|"))
    vocab = {token: i for i, token in enumerate([*special, *ordinary, "<unk>"])}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    vocab |= {letter: len(vocab) + i for i, letter in enumerate(letters)}
    vocab |= {"▁q": len(vocab), "</": len(vocab) + 1}
    merges = [("▁", "q"), ("<", "/")]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*parts, *([decoders.Strip(" ", 1, 0)] if prefix else [])]
    )
    tokenizer.add_tokens([AddedToken(each, normalized=False) for each in ordinary])
    tokenizer.add_special_tokens([*special, "<unk>"])
    return tokenizer


def unigram(special: list[str]) -> Any:
    """A Unigram model whose vocabulary holds its special tokens, as T5 and XLM-R have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    names = [*special, "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=90,
        special_tokens=names,
        unk_token="<unk>",
        initial_alphabet=list("<>/s|[]_"),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS, "markup: </s> <s> and [x]"] * 5, trainer)
    return tokenizer


def begins_with(tokenizer: Any, bos: str) -> Any:
    """With a post-processor that puts `bos` before a text."""
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def after_its_bytes(tokenizer: Any, bos: str) -> Any:
    """With Llama 3's post-processor: a sequence whose last step puts `bos` before a text."""
    from tokenizers import processors

    template = begins_with(tokenizer, bos).post_processor
    steps = [processors.ByteLevel(trim_offsets=False), template]
    tokenizer.post_processor = processors.Sequence(steps)
    return tokenizer


def with_runs_of_spaces(tokenizer: Any) -> Any:
    """With ordinary added tokens of spaces, as GPT-NeoX has them."""
    from tokenizers import AddedToken, normalizers

    tokenizer.add_tokens([AddedToken(" " * number, normalized=True) for number in (2, 3, 4)])
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def save(directory: Path, tokenizer: Any, **files: dict[str, Any]) -> Path:
    """The directory with tokenizer.json and the files named (without .json).

    Tokens under keys for ids become their ids.
    """

    def id_of(value: Any) -> Any:
        if isinstance(value, list):
            return [id_of(each) for each in value]
        return tokenizer.token_to_id(value) if isinstance(value, str) else value

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, values in files.items():
        values = {k: id_of(v) if k.endswith("_token_id") else v for k, v in values.items()}
        (directory / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return directory


def _named(token: str) -> dict[str, Any]:
    return {"content": token, "lstrip": False, "normalized": False, "special": True}


#: Shape to tokenizer, files, and the EOD, BOS and habit that are right.
SHAPES: dict[str, tuple[Any, dict[str, Any], str, str | None, bool]] = {
    "gemma 3": (
        lambda: begins_with(
            byte_fallback(["<pad>", "<eos>", "<bos>", "<start_of_turn>"], ["</s>", "<s>"], False),
            "<bos>",
        ),
        {"tokenizer_config": {"add_bos_token": True, "bos_token": "<bos>", "eos_token": "<eos>"}},
        "<eos>",
        "<bos>",
        True,
    ),
    "qwen 3": (
        lambda: byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<think>", "<s>"]),
        {
            "tokenizer_config": {
                "add_bos_token": False,
                "bos_token": None,
                "eos_token": "<|im_end|>",
            },
            "generation_config": {"eos_token_id": ["<|endoftext|>"], "bos_token_id": 0},
        },
        "<|im_end|>",
        None,
        False,
    ),
    "deepseek v3": (
        lambda: byte_level([BEGIN, END]),
        {
            "tokenizer_config": {
                "add_bos_token": True,
                "bos_token": _named(BEGIN),
                "eos_token": _named(END),
            }
        },
        END,
        BEGIN,
        True,
    ),
    "llama 3": (
        lambda: begins_with(
            byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]), "<|begin_of_text|>"
        ),
        {"tokenizer_config": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}},
        "<|eot_id|>",
        "<|begin_of_text|>",
        True,
    ),
    "llama 3.1, ids alone": (
        lambda: after_its_bytes(
            byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]),
            "<|begin_of_text|>",
        ),
        {
            "generation_config": {
                "bos_token_id": "<|begin_of_text|>",
                "eos_token_id": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
            }
        },
        "<|end_of_text|>",
        "<|begin_of_text|>",
        True,
    ),
    "smollm 2": (
        lambda: byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]),
        {
            "tokenizer_config": {
                "bos_token": "<|im_start|>",
                "eos_token": "<|im_end|>",
                "pad_token": "<|im_end|>",
                "unk_token": "<|endoftext|>",
            }
        },
        "<|im_end|>",
        "<|im_start|>",
        False,
    ),
    "pythia": (
        lambda: with_runs_of_spaces(byte_level(["<|endoftext|>", "<|padding|>"])),
        {
            "tokenizer_config": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
            "config": {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|endoftext|>"},
        },
        "<|endoftext|>",
        "<|endoftext|>",
        False,
    ),
    "gpt-2": (
        lambda: byte_level(["<|endoftext|>"]),
        {
            "special_tokens_map": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
            "tokenizer_config": {"add_bos_token": False},
        },
        "<|endoftext|>",
        "<|endoftext|>",
        False,
    ),
    "mistral": (
        lambda: begins_with(byte_fallback(["<s>", "</s>", "[INST]"]), "<s>"),
        {"special_tokens_map": {"bos_token": _named("<s>"), "eos_token": _named("</s>")}},
        "</s>",
        "<s>",
        True,
    ),
    "phi 3": (
        lambda: byte_fallback(["<s>", "</s>", "<|endoftext|>", "<|assistant|>"]),
        {
            "tokenizer_config": {
                "add_bos_token": False,
                "bos_token": "<s>",
                "eos_token": "<|endoftext|>",
            }
        },
        "<|endoftext|>",
        "<s>",
        False,
    ),
    "olmo 2": (
        lambda: byte_level(["<|endoftext|>", "<|pad|>"]),
        {
            "tokenizer_config": {
                "add_bos_token": False,
                "bos_token": "<|endoftext|>",
                "eos_token": "<|endoftext|>",
            }
        },
        "<|endoftext|>",
        "<|endoftext|>",
        False,
    ),
    "ids alone": (
        lambda: byte_level(["<|start|>", "<|stop|>"]),
        {"config": {"eos_token_id": ["<|stop|>", "<|start|>"], "bos_token_id": "<|start|>"}},
        "<|stop|>",
        "<|start|>",
        False,
    ),
    "bare gemma": (
        lambda: byte_fallback(["<eos>", "<bos>"], ["</s>", "<s>"], False),
        {},
        "<eos>",
        "<bos>",
        False,
    ),
    "bare qwen": (
        lambda: byte_level(["<|endoftext|>", "<|im_end|>"], ["<s>", "</s>"]),
        {},
        "<|endoftext|>",
        None,
        False,
    ),
    "bare deepseek": (lambda: byte_level([BEGIN, END]), {}, END, BEGIN, False),
    "bare llama 3": (
        lambda: begins_with(
            byte_level(["<|begin_of_text|>", "<|end_of_text|>"]), "<|begin_of_text|>"
        ),
        {},
        "<|end_of_text|>",
        "<|begin_of_text|>",
        True,
    ),
    "defaults of a configuration": (
        lambda: byte_level(["<|endoftext|>"]),
        {"config": {"eos_token_id": 2, "bos_token_id": 1}},
        "<|endoftext|>",
        None,
        False,
    ),
}
