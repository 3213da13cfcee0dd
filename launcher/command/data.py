"""`fleetune prepare` and `fleetune data`: the data, before any rank starts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.command.options import AsJson, Overrides, SpecPath, progress

if TYPE_CHECKING:
    from launcher.data.prepared import PreparedData
    from launcher.data.show import ShownSample, SplitStatistics

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
    for role, cleaned in done.index.get("cleaned", {}).items():
        steps = [f"{count:,} by {step}" for step, count in cleaned["dropped"].items()]
        typer.echo(f"  dropped from data.{role}: {', '.join(steps) or 'nothing'}")
    for role, skipped in done.index.get("skipped", {}).items():
        typer.echo(_told(role, skipped), err=True)


data_app = typer.Typer(no_args_is_help=True, help="Look into prepared data.")


@data_app.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `fleetune prepare` made.")],
    samples: Annotated[int, typer.Option(min=0, help="How many samples to decode, from --sample on.")] = 2,
    sample: Annotated[int, typer.Option(help="Number of the first sample to decode.")] = 0,
    split: Annotated[str, typer.Option(help="Split of the decoded samples.")] = "train",
    plot: Annotated[Path | None, typer.Option(help="Draw the lengths into a .png, .svg, .pdf or .html file.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every shard and compare its checksum.")] = False,
    as_json: AsJson = False,
) -> None:
    """Counts, lengths, and samples with the tokens that are learnt from in green ([[...]] when piped)."""
    from launcher.data.prepared import damages, open_folder
    from launcher.data.show import draw, statistics
    from launcher.errors import DataError

    data = open_folder(folder)
    problems = damages(folder, data.index, verify=verify)
    if problems:
        raise DataError.several(problems)
    found = {name: statistics(data, name) for name in data.index["splits"]}
    shown = _shown_samples(data, split, range(sample, sample + samples))
    if plot is not None:
        draw(plot, found)
    if as_json:
        splits = {name: told.to_json() for name, told in found.items()}
        told_samples = [asdict(one) for one in shown]
        typer.echo(json.dumps({"folder": str(folder), "splits": splits, "samples": told_samples}, indent=2))
    else:
        _print_shown(data, found, shown, split)


def _shown_samples(data: PreparedData, split: str, numbers: range) -> list[ShownSample]:
    from launcher.data.show import shown_sample
    from launcher.data.tokenizer import TokenizerSource, load_tokenizer
    from launcher.task import task_of

    if not numbers:
        return []
    tokenizer = load_tokenizer(TokenizerSource("DIR", str(data.tokenizer_dir)))
    spec = data.spec()
    task, part = task_of(spec, data.facts(spec.task)), data.split(split)
    numbers = range(numbers.start, min(numbers.stop, max(len(part), numbers.start + 1)))
    return [shown_sample(part, number, tokenizer, task, data.pad_id) for number in numbers]


def _print_shown(data: PreparedData, found: dict[str, SplitStatistics], shown: list[ShownSample], split: str) -> None:
    from rich.console import Console

    from launcher.data.show import bracketed, styled
    from launcher.units import show_bytes

    console = Console(soft_wrap=True, highlight=False)
    words = f"{data.folder}: {data.index['task']}, seq_len {data.index['seq_len']}, {data.vocab_size:,} token ids"
    console.print(words, markup=False)
    for name, told in found.items():
        counts = f"{told.num_records:,} records, {told.num_samples:,} samples, {told.num_tokens:,} tokens"
        console.print(f"\n{name}: {counts}, {told.num_shards} shards, {show_bytes(told.num_bytes)}")
        lengths = f"{told.shortest} to {told.longest}, median {told.median:g}, mean {told.mean:.1f}"
        console.print(f"  tokens per sample: {lengths}")
        for start, stop, count in zip(told.edges, told.edges[1:], told.counts, strict=False):
            bar = "█" * round(40 * count / max(told.counts))
            console.print(f"  {f'{start} to {stop - 1}':>16} {count:>9,} {bar}")
    for one in shown:
        others = "".join(f", {name} {value}" for name, value in one.others.items() if not isinstance(value, list))
        console.print(f"\n{split} sample {one.number}: {len(one.pieces)} tokens{others}", markup=False)
        console.print(styled(one) if console.is_terminal else bracketed(one), markup=False)


def _told(role: str, skipped: dict[str, Any]) -> str:
    """What was left out, as far as the index lists it."""
    lines = [f"skipped {skipped['count']:,} records of data.{role} (data.on_error: skip)"]
    lines += [f"  {problem}" for problem in skipped["first"][:SHOWN]]
    if skipped["count"] > SHOWN:
        lines.append(f"  ... and {skipped['count'] - SHOWN:,} more; index.json lists the first {len(skipped['first'])}")
    return "\n".join(lines)
