"""Manifests of Kubeflow's kinds: their fields, and the names that its controllers look for.

What is expected was read in the kubeflow/trainer repository: manifests/base/crds of releases 1.9.3
(PyTorchJob) and 2.0.0 to 2.3.0, pkg/webhooks/pytorch of 1.9.3, pkg/constants of 2.3.0.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

KUBERNETES = Path(__file__).resolve().parents[2] / "examples" / "kubernetes"
REPLICA = {"replicas": int, "restartPolicy": str, "template!": {"metadata": dict, "spec!": dict}}
REPLICATED_JOB = {
    "dependsOn": list,
    "name!": str,
    "replicas": int,
    "template!": {"metadata": dict, "spec!": dict},
}
#: The fields of each kind's `spec`, those that all the releases have; `!` marks required ones.
#: Pods (dict) are checked in test_linters.py.
FIELDS: dict[str, dict] = {
    "PyTorchJob": {
        "elasticPolicy": dict,
        "nprocPerNode": str,
        "pytorchReplicaSpecs!": {"Master!": REPLICA, "Worker": REPLICA},
        "runPolicy": {
            "activeDeadlineSeconds": int,
            "backoffLimit": int,
            "cleanPodPolicy": str,
            "managedBy": str,
            "schedulingPolicy": dict,
            "suspend": bool,
            "ttlSecondsAfterFinished": int,
        },
    },
    "TrainingRuntime": {
        "mlPolicy": {"mpi": dict, "numNodes": int, "torch": {}},
        "podGroupPolicy": dict,
        "template!": {
            "metadata": dict,
            "spec!": {
                "failurePolicy": {"maxRestarts": int, "restartStrategy": str, "rules": list},
                "network": dict,
                "replicatedJobs!": [REPLICATED_JOB],
                "startupPolicy": dict,
                "successPolicy": dict,
            },
        },
    },
    "TrainJob": {
        "managedBy": str,
        "runtimeRef!": {"apiGroup": str, "kind": str, "name!": str},
        "suspend": bool,
        "trainer": {
            "args": [str],
            "command": [str],
            "env": list,
            "image": str,
            "numNodes": int,
            "numProcPerNode": int,
            "resourcesPerNode": dict,
        },
    },
}


def differences(found: object, stated: object, place: str) -> list[str]:
    """Where a part of a manifest differs from the fields and types stated for it."""
    if isinstance(stated, type):
        return [] if type(found) is stated else [f"{place}: {found!r} is no {stated.__name__}"]
    if type(found) is not type(stated):
        return [f"{place}: {found!r} is no {type(stated).__name__}"]
    if isinstance(found, list):
        return [line for each in found for line in differences(each, stated[0], f"{place}[]")]
    known = {name.strip("!"): inner for name, inner in stated.items()}
    needed = {name.strip("!") for name in stated if name.endswith("!")}
    lines = [f"{place}.{name} is missing" for name in sorted(needed - found.keys())]
    for name, value in found.items():
        inner = f"{place}.{name}"
        lines += differences(value, known[name], inner) if name in known else [f"{inner}: unknown"]
    return lines


@pytest.mark.parametrize("name", ["pretrain-pytorchjob", "pretrain-trainjob"])
def test_fields_of_kubeflow(name):
    for document in yaml.safe_load_all((KUBERNETES / f"{name}.yaml").read_text()):
        assert differences(document["spec"], FIELDS[document["kind"]], document["kind"]) == []


def test_fields_that_kubeflow_would_refuse_are_found():
    runtime = {"mlPolicy": {"torch": {"numProcPerNode": 8}, "numNodes": "4"},
               "template": {"spec": {"replicatedJobs": [{"name": "node"}]}}}  # fmt: skip
    assert differences(runtime, FIELDS["TrainingRuntime"], "spec") == [
        "spec.mlPolicy.torch.numProcPerNode: unknown",
        "spec.mlPolicy.numNodes: '4' is no int",
        "spec.template.spec.replicatedJobs[].template is missing",
    ]


def test_what_kubeflow_looks_for():
    """Names that its controllers search: pkg/webhooks/pytorch of 1.9.3, pkg/constants of 2.3.0."""
    (job,) = yaml.safe_load_all((KUBERNETES / "pretrain-pytorchjob.yaml").read_text())
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        assert "pytorch" in [each["name"] for each in replica["template"]["spec"]["containers"]]
    runtime, job = yaml.safe_load_all((KUBERNETES / "pretrain-trainjob.yaml").read_text())
    reference = job["spec"]["runtimeRef"]
    assert reference == {"apiGroup": runtime["apiVersion"].split("/")[0],
                         "kind": runtime["kind"], "name": runtime["metadata"]["name"]}  # fmt: skip
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    template = node["template"]
    label = "trainer.kubeflow.org/trainjob-ancestor-step"
    assert (node["name"], template["metadata"]["labels"][label]) == ("node", "trainer")
    (container,) = template["spec"]["template"]["spec"]["containers"]
    assert container["name"] == "node"
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert job["spec"]["trainer"]["numProcPerNode"] == gpus
