"""A Kubeflow manifest of a plan: `TrainJob` (Trainer v2) or `PyTorchJob` (Training Operator v1). Rendering only.

Both hand torchrun its world by PET_* variables, so the command is torchrun's module and our run.py. Words reach the
container as a list, through no shell.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from launcher.emit.argv import job_words, rank_environment
from launcher.errors import ABSENT, SpecError
from launcher.job.cluster import KubernetesSite
from launcher.plan.values import Plan


def kubernetes_manifest(plan: Plan, site: KubernetesSite, spec_path: str, overrides: tuple[str, ...], name: str) -> str:
    """YAML for `kubectl apply -f -`. spec_path: inside the container. Raises `SpecError` without an image."""
    if site.image is None:
        raise SpecError("kubernetes.image", ABSENT, "is missing", "name an image with fleetune in the cluster file")
    make = _train_job if site.kind == "TrainJob" else _pytorch_job
    manifest = make(plan, site, _command(plan, site, spec_path, overrides), object_name(name))
    return yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True, width=10**6)


def object_name(name: str) -> str:
    """A DNS label, as names of objects must be: what is no letter, digit or hyphen becomes a hyphen."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"fleetune-{label}"[:50].rstrip("-")


def _command(plan: Plan, site: KubernetesSite, spec_path: str, overrides: tuple[str, ...]) -> list[str]:
    """PET_NNODES and the master's address are the operator's; what both leave to the image is told here."""
    ranks = ["--nproc-per-node", str(plan.gpus_per_node)]
    job = [f"{site.launcher}/run.py", *job_words(spec_path, overrides)]
    return [site.python, "-m", "torch.distributed.run", *ranks, *job]


def _environment(plan: Plan) -> list[dict[str, str]]:
    told = rank_environment(plan, plan.gpus_per_node)
    return [{"name": name, "value": value} for name, value in told.items()]


def _resources(plan: Plan, site: KubernetesSite) -> dict[str, Any]:
    amount = str(plan.gpus_per_node)
    resource = "cpu" if plan.device == "cpu" else site.gpu_resource
    return {"limits": {resource: amount}, "requests": {resource: amount}}


def _mounts(site: KubernetesSite) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """(volumes of the pod, mounts of its container)"""
    volumes = [
        {"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim}}
        for number, claim in enumerate(site.claims)
    ]
    mounts = [{"name": f"claim-{number}", "mountPath": path} for number, path in enumerate(site.claims.values())]
    return volumes, mounts


def _metadata(site: KubernetesSite, name: str, plan: Plan) -> dict[str, Any]:
    labels = {"app.kubernetes.io/managed-by": "fleetune"}
    return {
        "name": name,
        "namespace": site.namespace,
        "labels": labels,
        "annotations": {"fleetune/plan": plan.digest()},
    }


def _train_job(plan: Plan, site: KubernetesSite, command: list[str], name: str) -> dict[str, Any]:
    trainer: dict[str, Any] = {
        "image": site.image,
        "command": command,
        "numNodes": plan.nodes,
        "numProcPerNode": plan.gpus_per_node,
        "resourcesPerNode": _resources(plan, site),
    }
    if environment := _environment(plan):
        trainer["env"] = environment
    spec: dict[str, Any] = {"runtimeRef": {"name": site.runtime}, "trainer": trainer}
    volumes, mounts = _mounts(site)
    if volumes:
        pod = {"volumes": volumes, "containers": [{"name": "node", "volumeMounts": mounts}]}
        spec["runtimePatches"] = [{"manager": "fleetune/launch", "trainingRuntimeSpec": _patch(pod)}]
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(site, name, plan),
        "spec": spec,
    }


def _patch(pod: dict[str, Any]) -> dict[str, Any]:
    """Of the runtime's job set: its replicated job `node` is the trainer's, and so is the container of that name."""
    job = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    return {"template": {"spec": {"replicatedJobs": [job]}}}


def _pytorch_job(plan: Plan, site: KubernetesSite, command: list[str], name: str) -> dict[str, Any]:
    volumes, mounts = _mounts(site)
    container: dict[str, Any] = {
        "name": "pytorch",  # the operator looks for this name
        "image": site.image,
        "command": command,
        "resources": _resources(plan, site),
    }
    if environment := _environment(plan):
        container["env"] = environment
    pod: dict[str, Any] = {"containers": [container]}
    if volumes:
        container["volumeMounts"], pod["volumes"] = mounts, volumes
    replicas = {"Master": 1, "Worker": plan.nodes - 1}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(site, name, plan),
        "spec": {
            "nprocPerNode": str(plan.gpus_per_node),
            # not ExitCode: 75, told to stop and saved, would be final by the operator's reading
            "pytorchReplicaSpecs": {
                kind: {"replicas": number, "restartPolicy": "OnFailure", "template": {"spec": pod}}
                for kind, number in replicas.items()
                if number
            },
        },
    }
