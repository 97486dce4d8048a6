"""Scripts and manifests for clusters: their syntax, what they launch, and that its flags exist.

Slurm's programs are replaced by ones that print what they were asked to do.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from retro_mcore.cli.flags import parse_options

ROOT = Path(__file__).resolve().parents[2]
SLURM, KUBERNETES = ROOT / "examples" / "slurm", ROOT / "examples" / "kubernetes"
SCRIPTS = sorted([*SLURM.glob("*.sbatch"), *SLURM.glob("*.sh")])
MANIFESTS = {
    "data-stages": ["Job"] * 5,
    "pretrain-pytorchjob": ["PyTorchJob"],
    "pretrain-trainjob": ["TrainingRuntime", "TrainJob"],
}


def parse(words: list[str]) -> tuple[str, object]:
    """The command that a launcher's words run, and its options; unknown flags end the test."""
    place = next(i for i, word in enumerate(words) if re.fullmatch(r"tools/\w+\.py", word))
    name = Path(words[place]).stem
    options_type = "".join(map(str.title, name.split("_"))) + "Options"
    module = import_module(f"retro_mcore.cli.{name}")
    return name, parse_options(getattr(module, options_type), words[place + 1 :])


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Slurm's programs; each writes its words to a line of a file of its name."""
    for name, script in {"srun": "", "sbatch": 'echo "$(wc -l < "$0.log");cluster"',
                         "scontrol": '[ "$1" = show ] && echo node1 || true'}.items():  # fmt: skip
        path = tmp_path / name
        path.write_text(f'#!/bin/bash\nprintf "%q " "$@" >> "$0.log"; echo >> "$0.log"\n{script}\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(ROOT)
    return tmp_path


def asked(tools: Path, name: str) -> list[list[str]]:
    """The words of each call of a program."""
    path = tools / f"{name}.log"
    return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []


def start(script: str, *words: str, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHON": "python", "SLURM_JOB_ID": "7", **variables}
    return subprocess.Popen(["bash", str(SLURM / script), *words], cwd=ROOT, env=environment)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_a_job_of_an_array_takes_its_share(tools):
    variables = {"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_MIN": "10",
                 "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_GPUS_ON_NODE": "1"}  # fmt: skip
    flags = ("--project-dir", "p q", "--stage", "embed")
    assert start("data.sbatch", "build_index", *flags, **variables).wait() == 0
    (words,) = asked(tools, "srun")
    assert words[1:3] == ["python", "tools/build_index.py"]
    name, options = parse(words)
    assert (name, options.project_dir, options.shard) == ("build_index", "p q", "3/4")


@pytest.mark.parametrize(
    ("variables", "shard"), [({}, None), ({"SHARDS": "8"}, "5/8"), ({"SLURM_ARRAY_TASK_ID": "9",
     "SLURM_ARRAY_TASK_MIN": "9", "SLURM_ARRAY_TASK_MAX": "10"}, "1/2")]
)  # fmt: skip
def test_some_jobs_of_an_array_again(tools, variables, shard):
    array = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "5",
             "SLURM_ARRAY_TASK_COUNT": "2", **variables}  # fmt: skip
    code = start("data.sbatch", "build_index", "--project-dir", "p", **array).wait()
    assert code == (2 if shard is None else 0)
    assert [parse(words)[1].shard for words in asked(tools, "srun")] == [shard] * (code == 0)


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({"SLURM_CPUS_PER_TASK": "32"}, "--standalone --nproc-per-node 32"),
        ({"SLURM_CPUS_PER_TASK": "32", "PROCESSES": "4"}, "--standalone --nproc-per-node 4"),
        ({"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node[1-2]"},
         "--nnodes 2 --nproc-per-node 8 --rdzv-id 7 --rdzv-backend c10d "
         "--rdzv-endpoint node1:29507"),
    ],
)  # fmt: skip
def test_processes_of_a_stage(tools, variables, launcher):
    assert start("data.sbatch", "query_neighbors", "--project-dir", "p", **variables).wait() == 0
    (words,) = asked(tools, "srun")
    assert f"-m torch.distributed.run {launcher} tools/query_neighbors.py" in " ".join(words)
    assert parse(words)[0] == "query_neighbors"


@pytest.mark.parametrize("restarts", [0, 20])
def test_a_stage_out_of_time_is_requeued_a_limited_number_of_times(tools, restarts):
    (tools / "srun").write_text(f"#!/bin/bash\ntouch {tools}/started\nsleep 2\nexit 3\n")
    job = start("data.sbatch", "build_db", "--project-dir", "p", SLURM_RESTART_COUNT=str(restarts))
    while not (tools / "started").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait() == 3  # of the stage, which the signal does not end
    requeued = [words for words in asked(tools, "scontrol") if words[0] == "requeue"]
    assert requeued == ([["requeue", "7"]] if restarts == 0 else [])


@pytest.mark.parametrize("code", [0, 3])
def test_a_stage_that_has_just_ended_is_not_requeued(tools, code):
    """The signal comes when the stage has ended, and its script does not know yet."""
    (tools / "srun").write_text(
        "#!/bin/bash\n"
        "state() { sed 's/.*) //' /proc/$1/stat | cut -c 1; }\n"
        "(until [ $(state $$) = Z ]; do sleep 0.05; done; kill -USR1 $PPID; kill -CONT $PPID) &\n"
        "kill -STOP $PPID; until [ $(state $PPID) = T ]; do sleep 0.05; done\n"
        f"exit {code}\n"
    )
    assert start("data.sbatch", "build_db", "--project-dir", "p").wait() == code
    assert not [words for words in asked(tools, "scontrol") if words[0] == "requeue"]


def test_all_stages_are_submitted_in_order(tools):
    assert start("pipeline.sh", "/data/wiki", "/data/wiki.jsonl", EMBED_JOBS="3").wait() == 0
    submitted = asked(tools, "sbatch")
    stages = []
    for number, words in enumerate(submitted, start=1):
        place = words.index("examples/slurm/data.sbatch")
        after = words[words.index("--dependency") + 1] if "--dependency" in words else None
        assert after == (None if number == 1 else f"afterok:{number - 1}")
        name, options = parse([f"tools/{words[place + 1]}.py", *words[place + 2 :]])
        assert options.project_dir == "/data/wiki"
        stages.append((name, getattr(options, "stage", None), "--array" in words))
    assert stages == [
        ("preprocess_corpus", None, False), ("build_db", None, False),
        ("build_index", "embed", True), ("build_index", "train", False),
        ("build_index", "add", True), ("build_index", "merge", False),
        ("query_neighbors", None, False),
    ]  # fmt: skip
    assert submitted[2][submitted[2].index("--array") + 1] == "1-3"


@pytest.mark.parametrize(("found", "trains"), [(None, True), (1, True), (2, False)])
def test_training_starts_unless_the_doctor_finds_errors(tools, found, trains):
    """`found`: the exit code that doctor writes; None: it finds nothing, torchrun ends with 0."""
    config, run = tools / "run.yaml", tools / "run"
    config.write_text(f"save: {run}\nload: {run}\n")
    with (tools / "srun").open("a") as file:
        file.write('[[ "$*" == *doctor.py* ]] || exit 0\n')
        if found is not None:
            file.write(f"echo '{{\"exit_code\": {found}}}' > {run}.doctor.json\nexit 1\n")
    variables = {"RETRO_DOCTOR": "1", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node1"}
    code = start("pretrain.sbatch", str(config), "--project-dir", "/p", **variables).wait()
    assert code == (0 if trains else 2)
    calls = asked(tools, "srun")
    name, options = parse(calls[0])
    assert (name, options.save, options.project_dir) == ("doctor", str(run), "/p")
    assert len(calls) == 1 + trains


@pytest.mark.parametrize(("minutes", "code"), [(240, 0), (15.5, 2)])
def test_processes_and_time_of_a_training(tools, minutes, code):
    config, run = tools / "run.yaml", tools / "run"
    config.write_text(f"save: {run}\nload: {run}\n")
    variables = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "4"}
    variables["SLURM_JOB_END_TIME"] = str(int(time.time() + 60 * minutes))
    assert start("pretrain.sbatch", str(config), **variables).wait() == code
    for words in asked(tools, "srun"):
        assert words[words.index("--nproc-per-node") + 1] == "4"
        assert 200 < int(words[words.index("--exit-duration-in-mins") + 1]) <= 225
    assert len(asked(tools, "srun")) == (code == 0)


def commands(node: object) -> list[list[str]]:
    """The command of every container and trainer in a manifest."""
    if isinstance(node, list):
        return [words for inner in node for words in commands(inner)]
    if not isinstance(node, dict):
        return []
    found = [node["command"]] if "command" in node else []
    return found + commands(list(node.values()))


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    documents = list(yaml.safe_load_all((KUBERNETES / f"{name}.yaml").read_text()))
    assert [document["kind"] for document in documents] == MANIFESTS[name]
    assert all(document["apiVersion"] and document["metadata"]["name"] for document in documents)
    found = commands(documents)
    assert found
    for words in found:
        assert all(isinstance(word, str) for word in words)  # Kubernetes refuses numbers
        line = words[-1].replace("$((JOB_COMPLETION_INDEX + 1))", "8") if "-c" in words else ""
        command, options = parse(shlex.split(line) or words)
        assert options.project_dir == "/data/wiki"
        assert command != "pretrain_retro" or options.save == options.load


def test_every_manifest_is_tested():
    assert {path.stem for path in KUBERNETES.glob("*.yaml")} == MANIFESTS.keys()
