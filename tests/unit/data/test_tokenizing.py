"""Documents of any length, cut into blocks on their way into an indexed dataset."""

import json

import pytest

from retro_mcore.data.tokens import tokenizing
from retro_mcore.data.tokens.document_ids import DocumentIds
from retro_mcore.data.tokens.token_file import TokenFile
from retro_mcore.data.tokens.tokenizing import CorpusReader, make_dataset
from retro_mcore.project import ProjectConfig, ProjectPaths
from tests.unit.data.projects import built_project, documents


@pytest.mark.parametrize(("block", "batch"), [(1, 1), (50, 3), (1 << 20, 256)])
def test_any_block_gives_the_same_dataset(tmp_path, monkeypatch, block, batch):
    from retro_mcore.data.tokenizers.loading import load_project_tokenizer

    paths = ProjectPaths(built_project())
    tokenizer = load_project_tokenizer(ProjectConfig.load(paths.root), paths)
    texts = ["a", *documents(30), "b" * 3000, "c"]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(tokenizing, "_BLOCK", block)
    monkeypatch.setattr(tokenizing, "_BATCH", batch)
    make_dataset(source, tmp_path / "made", tokenizer, CorpusReader(), "")
    made = TokenFile(tmp_path / "made")
    assert len(made) == len(texts) == len(DocumentIds(tmp_path / "made"))
    for i, text in enumerate(texts):
        assert made.sequence(i).tolist() == [*tokenizer.tokenize(text), tokenizer.eod]
    assert make_dataset(source, tmp_path / "made", tokenizer, CorpusReader(), "") is None
