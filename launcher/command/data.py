"""`fleetune prepare`: the data, before any rank starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.command.options import Overrides, SpecPath, progress

SHOWN = 5
"""Skipped records that the screen shows."""


def prepare(
    spec_path: SpecPath,
    overrides: Overrides = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Folder to make; the same as data.prepared in the spec.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default one per core.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace data prepared from other inputs or options.")] = False,
) -> None:
    """Read, split and tokenise the data once, into a folder that `datasets` opens."""
    from launcher.data.prepare import prepare as prepare_data
    from launcher.job import load_spec

    spec = load_spec(spec_path, [*overrides, f"data.prepared={json.dumps(str(out))}"] if out else overrides)
    with progress() as show:
        done = prepare_data(spec, force=force, num_workers=workers, progress=show)
    typer.echo(f"{'prepared' if done.is_new else 'found'} {done.folder}")
    for name, split in done.index["splits"].items():
        counts = (f"{split[key]:,} {key.removeprefix('num_')}" for key in ("num_records", "num_samples", "num_tokens"))
        typer.echo(f"  {name}: {', '.join(counts)}, {len(split['shards'])} shards")
    for role, skipped in done.index["skipped"].items():
        typer.echo(_told(role, skipped), err=True)


def _told(role: str, skipped: dict[str, Any]) -> str:
    """What was left out, as far as the index lists it."""
    lines = [f"skipped {skipped['count']:,} records of data.{role} (data.on_error: skip)"]
    lines += [f"  {problem}" for problem in skipped["first"][:SHOWN]]
    if skipped["count"] > SHOWN:
        lines.append(f"  ... and {skipped['count'] - SHOWN:,} more; index.json lists the first {len(skipped['first'])}")
    return "\n".join(lines)
