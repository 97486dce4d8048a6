"""config.json, atomic writes, completion markers, stage records."""

import json

import pytest

from retro_mcore.errors import CorruptFileError, ProjectError
from retro_mcore.project import ProjectConfig, ProjectPaths, ProjectSettings
from retro_mcore.project.atomic import atomic_write
from retro_mcore.project.markers import FileState, signed_write, state_of, verify
from retro_mcore.project.records import check_stage, finish_stage

UPSTREAM = {
    "retro_block_size": 100000,
    "retro_gpt_chunk_length": 64,
    "retro_gpt_data_cache_path": None,
    "retro_gpt_data_path": ["0.6", "wiki_text_document", "0.4", "books_text_document"],
    "retro_gpt_eval_interval": 2000,
    "retro_gpt_eval_iters": 50,
    "retro_gpt_global_batch_size": 256,
    "retro_gpt_seed": 1234,
    "retro_gpt_seq_length": 2048,
    "retro_gpt_split": "98,2,0",
    "retro_gpt_train_samples": 1000000,
    "retro_gpt_tokenizer_type": "GPT2BPETokenizer",
    "retro_gpt_vocab_file": "tokenizer/gpt2-vocab.json",
    "retro_gpt_merge_file": "tokenizer/gpt2-merges.txt",
    "retro_gpt_tokenizer_model": None,
    "retro_bert_tokenizer_type": "BertWordPieceLowerCase",
    "retro_bert_vocab_file": "tokenizer/bert-vocab.txt",
    "retro_neighbor_dirs": {"train": "train_0a", "valid": "valid_0b", "test": None},
    "retro_gpt_something_newer": [1, 2],
}


def test_upstream_config_survives_load_and_save(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(UPSTREAM, indent=4, sort_keys=True))
    before = path.read_text()
    config = ProjectConfig.load(tmp_path)
    assert config.blend == ([0.6, 0.4], ["wiki_text_document", "books_text_document"])
    assert config.chunks_per_sample == 32
    assert config.num_train_samples == 1_000_000
    # 3,906 batches hold 1 interval of 2,000; one more evaluation; 50 batches of 256 each.
    assert config.num_valid_samples == 2 * 50 * 256
    assert config.num_test_samples == 50 * 256
    config.save(tmp_path)
    assert path.read_text() == before


def test_older_directories_have_args_json(tmp_path):
    (tmp_path / "args.json").write_text(json.dumps(UPSTREAM))
    assert ProjectConfig.load(tmp_path).retro_gpt_seq_length == 2048


def test_missing_and_malformed_configurations(tmp_path):
    with pytest.raises(ProjectError, match=r"config\.json.*Run preprocess_corpus"):
        ProjectConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CorruptFileError, match="not a JSON object"):
        ProjectConfig.load(tmp_path)
    (tmp_path / "config.json").write_text('{"retro_gpt_seed": 1}')
    with pytest.raises(ProjectError, match="retro_gpt_seq_length"):
        ProjectConfig.load(tmp_path)


def test_settings_round_trip(tmp_path):
    assert ProjectSettings.load(tmp_path) == ProjectSettings()
    settings = ProjectSettings(embedder="minilm", index_string="Flat", num_neighbors_save=7)
    settings.save(tmp_path)
    assert ProjectSettings.load(tmp_path) == settings


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_markers_find_truncated_altered_and_foreign_files(tmp_path):
    path = tmp_path / "shard.hdf5"
    assert state_of(path) is FileState.MISSING
    with signed_write(path, "built-from-a") as temporary:
        temporary.write_bytes(b"0123456789")
    assert state_of(path, "built-from-a") is FileState.COMPLETE
    assert state_of(path, "built-from-b") is FileState.DAMAGED
    path.write_bytes(b"0123456788")
    assert state_of(path) is FileState.DAMAGED
    path.write_bytes(b"01234")
    with pytest.raises(CorruptFileError, match=r"shard\.hdf5.*do it again"):
        verify(path, "do it again")
    path.unlink()
    assert state_of(path) is FileState.MISSING


def test_stages_refuse_another_configuration_by_name(tmp_path):
    paths = ProjectPaths(tmp_path)
    output = tmp_path / "out"
    first = check_stage(paths, "stage", {"--a": 1}, {"in": "x"}, output)
    finish_stage(paths, "stage", {"--a": 1}, {"in": "x"})
    assert check_stage(paths, "stage", {"--a": 1}, {"in": "x"}, output) == first
    with pytest.raises(ProjectError, match=r"--a: .*with 1, asked for 2.*another --project-dir"):
        check_stage(paths, "stage", {"--a": 2}, {"in": "x"}, output)
    with pytest.raises(ProjectError, match="in: is not what stage"):
        check_stage(paths, "stage", {"--a": 1}, {"in": "y"}, output)


def test_another_programs_output_is_not_overwritten(tmp_path):
    output = tmp_path / "train.hdf5"
    output.write_text("theirs")
    with pytest.raises(ProjectError, match="another program wrote it"):
        check_stage(ProjectPaths(tmp_path), "build_db", {}, {}, output)
