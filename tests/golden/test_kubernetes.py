"""Manifests for Kubeflow, whole; held against the published models of the Trainer's API, and hostile names."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from launcher.emit.kubernetes import kubernetes_manifest, object_name
from launcher.errors import SpecError
from launcher.job.cluster import KubernetesSite
from launcher.job.load import decode
from tests.golden.compare import Golden
from tests.golden.test_slurm import HOSTILE, plan

SITE = {"image": "registry.example/fleetune:1", "namespace": "training", "claims": {"shared": "/shared"}}
SPEC = "/shared/jobs/gpt.yaml"


def manifest(kind: str, nodes: int = 4, device: str = "cuda", spec: str = SPEC, **site: Any) -> str:
    values = decode(KubernetesSite, {**SITE, "kind": kind, **site})
    return kubernetes_manifest(plan("fsdp", nodes, 8, device), values, spec, ("training.lr=1e-4",), "My Run")


@pytest.mark.parametrize("kind", ["TrainJob", "PyTorchJob"])
def test_manifest(kind: str, golden: Golden) -> None:
    golden.check(f"kubernetes-{kind.lower()}.yaml", manifest(kind))


@pytest.mark.parametrize(("nodes", "device", "claims"), [(4, "cuda", {"a": "/a"}), (1, "cpu", {}), (512, "cuda", {})])
def test_a_train_job_is_one_by_the_published_models(nodes: int, device: str, claims: dict[str, str]) -> None:
    """kubeflow-trainer-api is generated from the custom resource's schema: read back, not a key is lost or altered."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    written = yaml.safe_load(manifest("TrainJob", nodes, device, claims=claims))
    read = models.TrainerV1alpha1TrainJob.from_dict(written)
    assert read.to_dict() == written


@pytest.mark.parametrize(("nodes", "kinds"), [(1, ["Master"]), (4, ["Master", "Worker"])])
def test_a_pytorch_job_has_one_master_and_the_rest_are_workers(nodes: int, kinds: list[str]) -> None:
    """By the documentation of the Training Operator v1; its pods' own parts by the models of Kubernetes' API."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    spec = yaml.safe_load(manifest("PyTorchJob", nodes))["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    assert list(replicas) == kinds
    assert sum(replica["replicas"] for replica in replicas.values()) == nodes
    for replica in replicas.values():
        assert replica["restartPolicy"] == "OnFailure"
        template = replica["template"]
        assert models.IoK8sApiCoreV1PodTemplateSpec.from_dict(template).to_dict() == template
        assert template["spec"]["containers"][0]["name"] == "pytorch"


@pytest.mark.parametrize("kind", ["TrainJob", "PyTorchJob"])
def test_hostile_names_are_words_of_a_list(kind: str) -> None:
    """No shell reads them: a path with quotes, a line break and `$(...)` comes back character by character."""
    hostile = f"/home/{HOSTILE}\nnext"
    text = manifest(kind, spec=hostile, claims={"c": f"/mnt/{HOSTILE}"})
    read = yaml.safe_load(text)
    pod = read["spec"]["trainer"] if kind == "TrainJob" else _master(read)
    assert hostile in pod["command"]
    assert pod["command"][0] == "python3"


def _master(read: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = read["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    return container


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("My Run", "fleetune-my-run"),
        (HOSTILE, "fleetune-it-s-my-touch-x-touch-y-1-50"),
        (100 * "a", "fleetune-" + 41 * "a"),
    ],
)
def test_names_of_objects_are_dns_labels(name: str, label: str) -> None:
    assert object_name(name) == label


def test_a_manifest_needs_an_image() -> None:
    with pytest.raises(SpecError, match=r"^kubernetes.image: is missing; name an image"):
        manifest("TrainJob", image=None)
