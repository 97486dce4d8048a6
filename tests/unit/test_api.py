"""The names that `retro_mcore` exports: where they live, their signatures, what they import."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import retro_mcore
from retro_mcore.api.project import Project
from retro_mcore.cli.commands import pretrain_retro
from retro_mcore.errors import ConfigurationError, ProjectError
from retro_mcore.evaluation.perplexity_config import EvaluatePerplexityConfig
from retro_mcore.project import integrity
from retro_mcore.stages.build_db import BuildDbConfig
from retro_mcore.stages.build_index import BuildIndexConfig
from retro_mcore.stages.preprocess_corpus import PreprocessCorpusConfig
from retro_mcore.stages.query_neighbors import QueryNeighborsConfig
from retro_mcore.stages.set_samples import SetSamplesConfig
from retro_mcore.stages.update_db import UpdateDbConfig
from retro_mcore.training.options.run import PretrainOptions


def test_editors_and_the_interpreter_see_the_same_names():
    """The imports for type checkers, the lazy table and `__all__` agree."""
    tree = ast.parse(Path(retro_mcore.__file__).read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    homes = {name.name: node.module for node in checked.body for name in node.names}
    assert homes == retro_mcore._HOMES
    assert sorted(homes) == sorted(retro_mcore.__all__)
    assert set(dir(retro_mcore)) >= set(homes)
    assert Path(retro_mcore.__file__).with_name("py.typed").is_file()


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("name", retro_mcore.__all__)
def test_every_name_has_a_docstring_and_is_what_it_says(name):
    value = getattr(retro_mcore, name)
    assert inspect.getdoc(value)
    assert value.__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        retro_mcore.no_such_name  # noqa: B018


@pytest.mark.parametrize(
    ("function", "leading", "config"),
    [
        (retro_mcore.pretrain, [], PretrainOptions),
        (retro_mcore.evaluate_perplexity, [], EvaluatePerplexityConfig),
        (Project.create, ["directory"], PreprocessCorpusConfig),
        (Project.build_db, ["self"], BuildDbConfig),
        (Project.build_index, ["self"], BuildIndexConfig),
        (Project.query_neighbors, ["self"], QueryNeighborsConfig),
        (Project.set_samples, ["self"], SetSamplesConfig),
        (Project.update, ["self"], UpdateDbConfig),
    ],
)
def test_functions_show_the_fields_of_their_configuration(function, leading, config):
    parameters = dict(inspect.signature(function).parameters)
    assert list(parameters)[: len(leading)] == leading
    fields = {field.name: field for field in dataclasses.fields(config)}
    assert set(parameters) == {*leading, *fields}
    for name, field in fields.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].annotation == field.type
    with pytest.raises(TypeError, match="no_such_option"):
        function(*("project" for _ in leading), no_such_option=1)


def test_a_directory_that_is_no_project_is_not_opened(tmp_path):
    with pytest.raises(ProjectError, match="not a project directory"):
        Project.open(tmp_path)


def test_the_api_is_imported_without_megatron():
    """The data pipeline needs none, and `--help` does not wait for it."""
    of_megatron = ("retro_mcore.model.", "retro_mcore.training.setup.")
    names = [name for name, home in retro_mcore._HOMES.items() if not home.startswith(of_megatron)]
    assert {"Project", "generate", "load_model", "pretrain", "setup_device"} <= set(names)
    code = f"import sys, retro_mcore; [getattr(retro_mcore, name) for name in {names!r}]\n"
    code += "assert 'megatron.core' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_generate_names_arguments_that_cannot_work():
    for given, name in (({"micro_batch_size": 0}, "micro_batch_size"), ({}, "prompts")):
        with pytest.raises(ConfigurationError, match=name):
            retro_mcore.generate(None, [], **given)


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("function", [retro_mcore.pretrain, pretrain_retro])
def test_training_from_python_honors_verify(function, monkeypatch):
    read_whole = []

    def pretrain(options, device):
        read_whole.append(integrity._everything.get())
        raise ProjectError("project", "is not trained on", "")

    monkeypatch.setattr("retro_mcore.training.pretraining.pretrain", pretrain)
    sizes = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 1, "lr": 1e-3}
    for verify in (True, False):
        with pytest.raises(ProjectError, match="is not trained on"):
            function(project_dir="p", micro_batch_size=1, device="cpu", verify=verify, **sizes)
    assert read_whole == [True, False]
