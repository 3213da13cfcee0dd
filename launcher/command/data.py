"""`fleetune prepare`: the data, before any rank starts."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.command.options import Overrides, SpecPath, progress


def prepare(
    spec_path: SpecPath,
    overrides: Overrides = [],  # noqa: B006
    force: Annotated[bool, typer.Option("--force", help="Replace data prepared from other inputs or options.")] = False,
) -> None:
    """Read, split and tokenise the data once, into a folder that `datasets` opens."""
    from launcher.data.prepare import prepare as prepare_data
    from launcher.job import load_spec

    spec = load_spec(spec_path, overrides)
    with progress() as show:
        done = prepare_data(spec, force=force, progress=show)
    typer.echo(f"{'prepared' if done.is_new else 'found'} {done.folder}")
    for name, split in done.index["splits"].items():
        counts = (f"{split[key]:,} {key.removeprefix('num_')}" for key in ("num_records", "num_samples", "num_tokens"))
        typer.echo(f"  {name}: {', '.join(counts)}, {len(split['shards'])} shards")
