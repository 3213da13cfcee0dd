"""`fleetune launch --via kubernetes`: the manifest on standard output, for `kubectl apply -f -`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from launcher.job import JobSpec
    from launcher.plan import Plan


def show_manifest(spec: JobSpec, made: Plan, spec_path: Path, overrides: list[str]) -> None:
    """Nothing is sent: a cluster's credentials are kubectl's."""
    from launcher.emit.kubernetes import kubernetes_manifest
    from launcher.job import load_cluster

    site = load_cluster(spec.cluster.name).kubernetes
    name = Path(spec.output_dir).name
    typer.echo(kubernetes_manifest(made, site, str(spec_path.absolute()), tuple(overrides), name), nl=False)
