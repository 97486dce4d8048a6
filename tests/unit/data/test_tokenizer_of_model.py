"""The tokenizer in a Hugging Face model's directory."""

from __future__ import annotations

import pytest

from retro_mcore.data.tokenizers.loading import build_tokenizer
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
    ("files", "hint"),
    [
        (["tokenizer.model"], "GPTSentencePieceTokenizer --tokenizer-model"),
        (["vocab.json", "merges.txt"], "GPT2BPETokenizer --vocab-file"),
        ([], "tokenizer.json"),
    ],
)
def test_a_directory_without_it_says_which_type_to_use(tmp_path, files, hint):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(TokenizerError, match=hint):
        build_tokenizer("HuggingFaceTokenizer", tmp_path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('{"eos_token": "</s>"}', "no vocabulary under the key model"),
        ("[1]", "no vocabulary under the key model"),
        ("{", "not JSON"),
        ('{"model": {"type": "BPE"}}', "not a tokenizer.json"),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_another_file_of_the_directory_is_told_by_what_it_lacks(tmp_path, content, found, beside):
    """Met by who names tokenizer_config.json, which lies beside tokenizer.json."""
    if beside:
        save_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    right = tmp_path / "tokenizer.json" if beside else "a tokenizer.json or its directory"
    with pytest.raises(TokenizerError) as caught:
        build_tokenizer("HuggingFaceTokenizer", tmp_path / "tokenizer_config.json")
    assert caught.value.subject == str(tmp_path / "tokenizer_config.json")
    assert found in str(caught.value)
    assert caught.value.hint == f"Name {right}"
