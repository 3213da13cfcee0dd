"""Optional packages that a spec needs: asked for by name before any process starts."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from launcher.errors import Problem, SpecError
from launcher.job.optimisers import OPTIMISERS
from launcher.job.spec import JobSpec

_TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""Destination -> the package that is imported; each has an extra of the same name."""


def check_packages(spec: JobSpec) -> None:
    """Raises `SpecError` for each that is not installed here."""
    problems = [
        Problem(path, value, f"needs the package {package}, which is not installed", f"pip install 'fleetune[{extra}]'")
        for path, value, package, extra in _needed(spec)
        if find_spec(package.replace("-", "_")) is None
    ]
    if problems:
        raise SpecError.several(problems)


def _needed(spec: JobSpec) -> Iterator[tuple[str, str, str, str]]:
    """Path, value, package, extra."""
    name = spec.training.optimizer
    optimiser = OPTIMISERS[name]
    if optimiser.package and optimiser.extra:
        yield "training.optimizer", name, optimiser.package, optimiser.extra
    if spec.method.name == "qlora":
        yield "method.name", "qlora", "bitsandbytes", "bitsandbytes"
    for destination in spec.tracking.to:
        yield "tracking.to", destination, _TRACKERS[destination], destination
