"""The commands of docs/guides run in the order shown, at small size.

A launcher (`python`, `torchrun`) becomes a call of the command's main in this process, `/data` a
temporary folder, and sizes become small by the two tables below.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from retro_mcore.cli.commands import (
    build_db,
    build_index,
    convert_checkpoint,
    preprocess_corpus,
    pretrain_retro,
    query_neighbors,
)
from tests.integration.small_checkpoint import small_checkpoint
from tests.integration.test_serve import Server, running_server
from tests.unit.checkpoint.bridge_checkpoint import give_bridges_configuration
from tests.unit.data.projects import (
    built_project,
    documents,
    preprocess_options,
    write_corpus,
)
from tests.unit.data.test_tokenizer_of_model import save_tokenizer

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ROOT / "docs" / "guides"

#: Values that replace those shown, for every command with the flag.
SHOWN = {
    "--vocab-size": "500",
    "--seq-length": "64",
    "--retro-chunk-length": "16",
    "--train-samples": "8",
    "--train-iters": "1",
    "--global-batch-size": "2",
    "--micro-batch-size": "2",
    "--num-layers": "2",
    "--hidden-size": "32",
    "--num-attention-heads": "2",
    "--world-size": "1",
    "--tensor-model-parallel-size": "1",
    "--max-new-tokens": "8",
}
#: Flags that are given besides, by command.
ADDED = {
    "preprocess_corpus": "--split 60,20,20 --train-samples 8 --eval-iters 1 --retro-block-size 20",
    "build_index": "--embedder lexical --device cpu",
    "pretrain_retro": "--num-workers 0 --device cpu",
    "evaluate_perplexity": "--num-workers 0 --device cpu",
    "generate": "--device cpu",
    "doctor": "--device cpu",
}
#: The decoder of two layers that the sizes above give has no layer 6, where Retro's begin.
FROM_SCRATCH = "--retro-decoder-layers 2 --retro-encoder-num-layers 1"
#: Sizes of a model that a configuration file of examples/ describes.
CONFIGURED = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 64 "
    "--retro-chunk-length 16 --global-batch-size 2 --train-samples 8 --micro-batch-size 2 "
    "--world-size 1"
)
#: Programs that are not run, and why.
NOT_RUN = {
    "hf": "downloads from the Hugging Face hub",
    "squeue": "asks a Slurm cluster",
    "kubectl": "asks a Kubernetes cluster",
    "docker": "needs a container engine",
}


def bash_lines(page: Path) -> list[str]:
    """The commands of a page's bash blocks, each on one line."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def small(name: str, flags: list[str]) -> list[str]:
    """A command's flags with the tables' values in place of their own."""
    added = ADDED.get(name, "").split()
    if name == "pretrain_retro":
        added += CONFIGURED.split() if "--config" in flags else []
        added += [] if "--load-gpt" in flags or "--finetune" in flags else FROM_SCRATCH.split()
    values = {flag: SHOWN[flag] for flag in flags if flag in SHOWN}
    values |= dict(zip(added[::2], added[1::2], strict=True))
    kept: list[str] = []
    dropping = False
    for word in flags:
        dropping = word in values if word.startswith("--") else dropping
        kept += [] if dropping else [word]
    return [*kept, *(word for pair in values.items() for word in pair)]


def launched(words: list[str]) -> tuple[str, list[str]]:
    """The command and its flags, behind whatever launches them."""
    place = next(i for i, word in enumerate(words) if re.fullmatch(r"tools/\w+\.py", word))
    assert (ROOT / words[place]).is_file()
    return Path(words[place]).stem, words[place + 1 :]


class Shell:
    """Runs the lines of a page."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.data = folder / "data"
        self.data.mkdir()
        self.server: Server | None = None
        self.servers = ExitStack()
        monkeypatch.chdir(folder)

    def run(self, line: str) -> None:
        for shown, here in (("/data/", self.data), ("examples/", ROOT / "examples")):
            line = re.sub(rf"(?<![\w/]){shown}", f"{here}/", line)
        words = shlex.split(line, comments=True)
        if words[0] in NOT_RUN:
            return
        known: dict[str, Callable[[str, list[str]], None]] = {
            "curl": self.curl, "export": self.export, "sbatch": self.sbatch,
            "python": self.launch, "torchrun": self.launch,
        }  # fmt: skip
        known.get(words[0], self.bash)(line, words)

    def launch(self, line: str, words: list[str]) -> None:
        if words[0] == "torchrun":
            assert re.match(r"torchrun --nproc-per-node \d+ tools/", " ".join(words)), line
        name, flags = launched(words)
        if name == "serve":
            return self.serve(flags)
        warned = (1,) if name == "doctor" else ()  # of a small disk, say
        assert self.main(name, flags) in (0, *warned), line

    def main(self, name: str, flags: list[str]) -> int:
        return import_module(f"retro_mcore.cli.{name}").main(small(name, flags))

    def bash(self, line: str, words: list[str]) -> None:
        if words[:2] == ["bash", f"{ROOT}/examples/slurm/pretrain.sbatch"]:
            assert words[-1] == "--dry-run"
            assert self.main("pretrain_retro", ["--config", *words[2:]]) == 0
            return
        assert words[0] in ("sed", "cat", "ls", "grep"), f"{line}: not run, and not in NOT_RUN"
        subprocess.run(["bash", "-c", line], check=True, cwd=self.folder)

    def export(self, line: str, words: list[str]) -> None:
        for name, value in (word.split("=", 1) for word in words[1:]):
            self.monkeypatch.setenv(name, value)

    def serve(self, flags: list[str]) -> None:
        """Start a server of the small project and model; the flags that say where are ours."""
        assert self.server is None
        assert flags[flags.index("--project-dir") + 1] == f"{self.data}/wiki"
        assert flags[flags.index("--load") + 1] == f"{self.data}/retro"
        ours = ("--project-dir", "--load", "--port", "--tensor-model-parallel-size")
        for flag in ours:
            del flags[(place := flags.index(flag)) : place + 2]
        key = os.environ.get("RETRO_MCORE_API_KEY")
        self.server = self.servers.enter_context(running_server(*flags, key=key))

    def curl(self, line: str, words: list[str]) -> None:
        """A request as curl sends it; it must be answered 200."""
        assert self.server is not None
        options = [(words[i], words[i + 1]) for i in range(1, len(words) - 1)]
        headers = dict(value.split(": ", 1) for name, value in options if name == "-H")
        (url,) = [word for word in words if word.startswith("http")]
        body = next((json.loads(value) for name, value in options if name == "-d"), None)
        method = "GET" if body is None else "POST"
        headers.setdefault("Authorization", "")
        status, answer = self.server.request(method, urlsplit(url).path, body, **headers)
        assert status == 200, (line, answer)

    def stop(self) -> None:
        """Stop the server as its user does."""
        if self.server is not None:
            self.server.process.send_signal(signal.SIGINT)
            assert self.server.process.wait(120) == 0
        self.servers.close()

    def sbatch(self, line: str, words: list[str]) -> None:
        if "--wrap" not in words:
            return self.sbatch_script(words[1:])
        jobs = next((word for word in words if word.startswith("--array=")), "--array=1-1")
        first, last = map(int, jobs.removeprefix("--array=").split("-"))
        command = words[words.index("--wrap") + 1]
        for job in range(first, last + 1):
            self.run(command.replace("$SLURM_ARRAY_TASK_ID", str(job)))

    def sbatch_script(self, words: list[str]) -> None:
        """Run a script with Slurm's programs in our place, and then what it gave srun to run."""
        place = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
        subprocess.run(["bash", "-n", words[place]], check=True)
        given = self.folder / "given"
        for name, script in {
            "scontrol": "echo node1",
            "srun": f"printf '%s\\n' \"$@\" > {given}",
            "python": "echo --shutdown-timeout",
        }.items():
            (self.folder / name).write_text(f"#!/bin/bash\n{script}\n")
            (self.folder / name).chmod(0o755)
        variables = {"PATH": f"{self.folder}:{os.environ['PATH']}", "PYTHON": "python",
                     "SLURM_JOB_NODELIST": "node1", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7",
                     "SLURM_SUBMIT_DIR": str(self.folder)}  # fmt: skip
        subprocess.run(["bash", *words[place:]], check=True, env={**os.environ, **variables})
        name, flags = launched(given.read_text().splitlines())
        assert self.main(name, flags) == 0


def texts(shell: Shell) -> None:
    write_corpus(shell.data / "wiki.jsonl", documents())


def model_and_project(shell: Shell) -> None:
    shutil.copytree(built_project(), shell.data / "wiki")
    shutil.copytree(small_checkpoint(), shell.data / "retro")


def hugging_face_models(shell: Shell) -> None:
    """A tiny Llama and a tiny Qwen with random weights, each with a tokenizer."""
    import transformers

    texts(shell)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 6,
             "intermediate_size": 48, "num_key_value_heads": 2}  # fmt: skip
    for family, name in (("llama", "Llama-3.1-8B"), ("qwen3", "Qwen3-8B")):
        tokenizer = save_tokenizer(shell.data / name)
        config = transformers.AutoConfig.for_model(family, vocab_size=len(tokenizer), **sizes)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(shell.data / name)


def retired(shell: Shell) -> None:
    """A project directory and a checkpoint as Megatron's Retro left them."""
    shutil.copytree(built_project(), project := shell.data / "wiki")
    (project / "retro_mcore.json").unlink()
    for path in [*project.rglob("*.done"), *project.glob("stages/*")]:
        path.unlink()
    shutil.rmtree(project / "logs", ignore_errors=True)
    made = str(shell.folder / "made")
    pretrain_retro(
        project_dir=str(project), save=made, retro_origin="mcore-0.15", num_layers=6,
        hidden_size=32, num_attention_heads=2, position_embedding_type="rope", train_iters=1,
        micro_batch_size=2, lr=1e-3, num_workers=0, device="cpu",
    )  # fmt: skip
    convert_checkpoint(load=made, save=str(shell.data / "megatron-retro"), target="megatron-torch",
                       target_tensor_parallel_size=2)  # fmt: skip


def two_domains(shell: Shell) -> None:
    """An aligned project, a model with its tokenizer, and texts of another domain."""
    shutil.copytree(small_checkpoint(), shell.data / "retro")
    corpus = write_corpus(shell.data / "wiki.jsonl", documents())
    write_corpus(shell.data / "news.jsonl", documents(60)[40:56])
    where = {"project_dir": str(shell.data / "wiki")}
    tokenizer = str(built_project() / "tokenizer" / "sentencepiece.model")
    options = preprocess_options(
        shell.data / "wiki", corpus, samples="aligned", tokenizer_model=tokenizer
    )
    preprocess_corpus(**vars(options))
    build_db(**where)
    build_index(**where, embedder="lexical")
    query_neighbors(**where)


def bridge_model(shell: Shell) -> None:
    """A project, and a checkpoint as Megatron-Bridge saves it."""
    model_and_project(shell)
    (checkpoint,) = (shell.data / "retro").glob("iter_*")
    give_bridges_configuration(checkpoint)


PAGES = {
    "bridge": bridge_model,
    "own_text": texts,
    "llama_or_qwen": hugging_face_models,
    "perplexity": model_and_project,
    "serve": model_and_project,
    "change_database": two_domains,
    "megatron": retired,
    "slurm": texts,
    "clusters": model_and_project,
}

#: Pages with two projects, or with a server in a process of its own.
SLOW = ("llama_or_qwen", "serve", "change_database")


def test_every_page_is_run():
    assert {page.stem for page in GUIDES.glob("*.md")} - {"README"} == PAGES.keys()


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else []) for page in PAGES],
)
def test_commands_run_in_order(page, tmp_path, monkeypatch):
    shell = Shell(tmp_path, monkeypatch)
    PAGES[page](shell)
    try:
        for line in bash_lines(GUIDES / f"{page}.md"):
            shell.run(line)
    finally:
        shell.stop()
