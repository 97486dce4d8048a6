"""config.json and retro_mcore.json of strangers, of editors and of damaged disks: they load, or one
error names the file and each key that cannot be."""

from __future__ import annotations

import copy
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_mcore.cli import build_db, build_index, plan_scale, query_neighbors
from retro_mcore.errors import CorruptFileError, ProjectError, RetroError, SeveralErrors
from retro_mcore.project import ProjectConfig, ProjectSettings

CONFIG = {
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
    "retro_database": {"project_dir": "../other", "neighbor_dirs": {"train": "train_0c"}},
}
SETTINGS = {
    "json_keys": ["text"],
    "growth": [1, 2],
    "embedder": "minilm",
    "embedder_pooling": None,
    "embedding_dimension": 384,
    "index_string": "IVF4,Flat",
    "index_split": False,
    "nprobe": 4,
    "num_neighbors_save": 20,
}
NUMBERS = [name for name, value in CONFIG.items() if isinstance(value, int)]


def load_with(folder, **changes):
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return ProjectConfig.load(folder)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [None, "x", "512", 512.0, 1e30, True, -1, 10**30, [], {}, [1]])
def test_a_number_that_is_none_is_named(tmp_path, name, value):
    with pytest.raises(CorruptFileError, match=rf"config\.json: {name} is .*, not "):
        load_with(tmp_path, **{name: value})


OTHERS = [
    *({name: 0} for name in NUMBERS if name not in ("retro_gpt_eval_iters", "retro_gpt_seed")),
    {"retro_gpt_seq_length": 100},
    {"retro_gpt_seed": 2**32},
    *(
        {"retro_gpt_split": value}
        for value in (None, "", "x", 98, "1,2,3,4", "-1,2", "nan,1", "0,0", "90,5", "969,30,1")
    ),
    *(
        {"retro_gpt_data_path": value}
        for value in (
            *(None, "c0", [], {}, 1, [""], ["."], ["/"], [1], [None], ["../../etc/passwd"]),
            *(["1", "a", "1"], ["1", "\ud800"], ["1", "a\0b"], ["x", "a"], [None, "a"], [[], "a"]),
            *([0, "a"], [-1, "a"], ["nan", "a"], ["inf", "a"], [True, "a"], [10**400, "a"]),
        )
    ),
    *({"retro_neighbor_dirs": value} for value in (["a"], "a", 0, {"train": 1}, {"train": [None]})),
    *({"retro_neighbor_dirs": {"train": value}} for value in ("", "../other", "/etc", "a/../..")),
    *({"retro_database": value} for value in ({"a": 1}, [], "x", {"project_dir": "x"}, {})),
    {"retro_database": {"project_dir": "", "neighbor_dirs": {}}},
    {"retro_database": {"project_dir": 1, "neighbor_dirs": {}}},
    {"retro_database": {"project_dir": "x", "neighbor_dirs": {"train": ".."}}},
    *({"retro_gpt_vocab_file": value} for value in (1, [], "", "../x", "a\0", "\ud800")),
    *({"retro_gpt_tokenizer_type": value} for value in (None, 1, [])),
    *({"retro_bert_tokenizer_type": value} for value in (1, "", "BertWordPieceUpperCase")),
]


@pytest.mark.parametrize("changes", OTHERS, ids=lambda changes: ascii(changes)[:60])
def test_a_value_that_cannot_be_is_named(tmp_path, changes):
    (name,) = changes
    with pytest.raises(CorruptFileError, match=rf"config\.json: {name} "):
        load_with(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"retro_gpt_data_path": ["only"]},
        {"retro_gpt_data_path": [0.5, "a", 2, "/absolute/b"]},
        {"retro_gpt_vocab_file": "/absolute/vocab.json"},
        {"retro_gpt_data_cache_path": "/absolute/cache"},
        {"retro_neighbor_dirs": None},
        {"retro_database": None},
        {"retro_gpt_eval_iters": 0},
        {"retro_gpt_seed": 0},
        {"retro_gpt_newer": {"any": [math.pi, None]}},
    ],
    ids=str,
)
def test_what_other_writers_may_write_loads(tmp_path, changes):
    load_with(tmp_path, **changes)


def test_all_problems_are_told_together(tmp_path):
    changes = {"retro_gpt_seed": "x", "retro_gpt_split": None, "retro_gpt_data_path": []}
    content = {name: value for name, value in CONFIG.items() if name != "retro_gpt_eval_iters"}
    (tmp_path / "config.json").write_text(json.dumps({**content, **changes}))
    with pytest.raises(SeveralErrors) as caught:
        ProjectConfig.load(tmp_path)
    for name in ("retro_gpt_eval_iters", *changes):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 500, b"\xff\xfe", b"NaN", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}", b"[1]"],
    ids=repr,
)
@pytest.mark.parametrize("name", ["config.json", "args.json", "retro_mcore.json"])
def test_a_file_that_is_no_json_object(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    loader = ProjectSettings if name == "retro_mcore.json" else ProjectConfig
    with pytest.raises(CorruptFileError, match=name.replace(".", r"\.")):
        loader.load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "args.json", "retro_mcore.json"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_key_that_stands_twice_is_named(tmp_path, name, inside):
    """Met by who edits the file by hand, and changes the first of both."""
    content = SETTINGS if name == "retro_mcore.json" else CONFIG
    key = "train" if inside else next(iter(content))
    twice = f'"{key}": null, "{key}": 1'
    (tmp_path / name).write_text(json.dumps(content)[:-1] + f', "unheard_of": {{{twice}}}}}')
    if not inside:
        (tmp_path / name).write_text(f"{{{twice}, {json.dumps(content)[1:]}")
    loader = ProjectSettings if name == "retro_mcore.json" else ProjectConfig
    with pytest.raises(CorruptFileError, match=f"{name}: has the key {key} more than once"):
        loader.load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"json_keys": "text"},
        {"growth": ["x"]},
        {"embedder": 1},
        {"embedder_pooling": "max"},
        {"embedding_dimension": 0},
        {"embedding_dimension": "384"},
        {"index_string": "../../x"},
        {"index_string": ""},
        {"index_split": 1},
        {"samples": "dense"},
        {"chunk_neighbor_dirs": {"train": 1}},
        {"chunk_neighbor_dirs": {"train": "../chunks_train"}},
        {"nprobe": 10**12},
        {"num_neighbors_save": True},
        {"unheard_of": 1},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_named(tmp_path, changes):
    (tmp_path / "retro_mcore.json").write_text(json.dumps({**SETTINGS, **changes}))
    with pytest.raises(CorruptFileError, match=rf"retro_mcore\.json: .*{next(iter(changes))}"):
        ProjectSettings.load(tmp_path)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**12, 10**30]),
    st.floats(),
    st.text(st.characters(), max_size=6),
    st.sampled_from(
        ["", ".", "..", "/", "../../etc/passwd", "\ud800", "a\0", "nan", "1e999", "9" * 50]
    ),
)


def containers(inner):
    return st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner)


VALUES = st.recursive(SCALARS, containers, max_leaves=5)


@st.composite
def mutations(draw, valid):
    """The valid file with some values replaced, removed or put deeper inside."""
    mutated = copy.deepcopy(valid)
    for name in draw(st.lists(st.sampled_from(sorted(valid)), min_size=1, max_size=3)):
        action = draw(st.sampled_from(["replace", "remove", "inside"]))
        value = mutated.get(name)
        if action == "remove":
            mutated.pop(name, None)
        elif action == "inside" and isinstance(value, list) and value:
            value[draw(st.integers(0, len(value) - 1))] = draw(VALUES)
        elif action == "inside" and isinstance(value, dict) and value:
            value[draw(st.sampled_from(sorted(value)))] = draw(VALUES)
        else:
            mutated[name] = draw(VALUES)
    return mutated


@given(mutations(CONFIG))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_any_mutation_of_a_configuration_loads_or_is_refused(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "config.json").write_text(json.dumps(content))
    try:
        config = ProjectConfig.load(folder)
    except (ProjectError, SeveralErrors):
        return
    weights, prefixes = config.blend
    assert len(weights) == len(prefixes) > 0
    assert config.chunks_per_sample * config.retro_gpt_chunk_length == config.retro_gpt_seq_length
    assert all(config.num_samples(split) >= 0 for split in ("train", "valid", "test"))
    for prefix in prefixes:
        (folder / "data" / prefix).with_suffix(".bin").exists()
    config.save(folder)
    assert ProjectConfig.load(folder) == config


@given(mutations(SETTINGS))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_any_mutation_of_the_settings_loads_or_is_refused(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "retro_mcore.json").write_text(json.dumps(content))
    try:
        ProjectSettings.load(folder)
    except RetroError as error:
        assert "retro_mcore.json" in str(error)  # noqa: PT017


@given(content=mutations(CONFIG), command=st.sampled_from(["db", "index", "query", "scale"]))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_commands_tell_a_broken_configuration_in_lines(tmp_path_factory, content, command):
    """A project that holds its configuration alone."""
    folder = tmp_path_factory.getbasetemp() / "alone"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    project = ["--project-dir", str(folder)]
    main, flags = {
        "db": (build_db.main, project),
        "index": (build_index.main, project),
        "query": (query_neighbors.main, project),
        "scale": (plan_scale.main, ["--tokens", "1B", *project]),
    }[command]
    assert main(flags) in ((0, 2) if command == "scale" else (2,))
