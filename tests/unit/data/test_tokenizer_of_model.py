"""The tokenizer in a Hugging Face model's directory."""

from __future__ import annotations

import pytest

from retro_mcore.data.tokenizers import build_tokenizer
from retro_mcore.errors import TokenizerError

TEXTS = ["The quick brown fox.", "for i in range(3):\n    print(i)", "Ünïcode, too: 漢字"]


def save_tokenizer(path):
    """A small byte-level BPE, saved as models of the Llama 3 and Qwen families are."""
    import tokenizers
    import transformers

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXTS, 300, special_tokens=["<|begin_of_text|>", "<|endoftext|>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|endoftext|>",
    )
    fast.save_pretrained(path)
    return fast


def test_it_tokenizes_as_transformers_does(tmp_path):
    theirs = save_tokenizer(tmp_path)
    ours = build_tokenizer("HuggingFaceTokenizer", tmp_path)
    for text in TEXTS:
        assert ours.tokenize(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.detokenize(ours.tokenize(text)) == text
    assert ours.vocab_size == len(theirs)
    assert (ours.eod, ours.bos) == (theirs.eos_token_id, theirs.bos_token_id)


@pytest.mark.parametrize(
    ("files", "mend"),
    [
        (["tokenizer.model"], "GPTSentencePieceTokenizer --tokenizer-model"),
        (["vocab.json", "merges.txt"], "GPT2BPETokenizer --vocab-file"),
        ([], "tokenizer.json"),
    ],
)
def test_a_directory_without_it_says_which_type_to_use(tmp_path, files, mend):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(TokenizerError, match=mend):
        build_tokenizer("HuggingFaceTokenizer", tmp_path)
