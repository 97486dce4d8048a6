"""Models that several tests of retrieval share."""

from __future__ import annotations

import shutil

import pytest

from retro_mcore.retrieval.bert_tokens import default_bert_vocab


@pytest.fixture
def tiny_bert(tmp_path):
    """A Hugging Face encoder of a few kilobytes, without a pooler as many are."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    config = BertConfig(num_hidden_layers=1, **sizes)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(default_bert_vocab().with_name(name), tmp_path / "bert")
    return tmp_path / "bert"
