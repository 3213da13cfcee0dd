"""Looks into a checkpoint of any format without loading it, and tells two apart.

    fleetune inspect runs/my-gpt
    fleetune inspect zero:ckpt --diff hf:my-model --json

Only metadata is read; with `--diff` all values are, in stretches.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from launcher.errors import EXIT_DONE, UserError
from launcher.stored.state import STEP, State
from launcher.stored.values import Ledger, Stored, Values, num_bytes, numel
from launcher.units import show_bytes, show_count
from tools.conversion.opening import Opened, locate_source
from tools.conversion.verify import stretches


def describe(opened: Opened) -> dict[str, Any]:
    """Everything that is shown, as plain values; sizes in bytes."""
    state = opened.state
    return {
        "format": state.kind,
        "path": opened.where,
        "step": state.step,
        "num_ranks": state.num_ranks,
        "zero_stage": state.stage,
        "compute_dtype": _name(state.compute_dtype) if state.compute_dtype else None,
        "num_tensors": len(state.tensors),
        "num_elements": sum(map(numel, state.tensors.values())),
        "weights_bytes": sum(map(num_bytes, state.tensors.values())),
        "optimizer": _optimizer(state),
        "files": _files(state),
        "tied": dict(state.aliases),
        "tensors": {name: _tensor(state, name, values) for name, values in state.tensors.items()},
    }


def _optimizer(state: State) -> dict[str, Any] | None:
    if state.optimizer is None:
        return None
    values = [values for states in state.optimizer.state.values() for values in states.values()]
    groups = [{**group.settings, "num_parameters": len(group.names)} for group in state.optimizer.groups]
    return {"states": [*state.optimizer.moments(), STEP], "bytes": sum(map(num_bytes, values)), "groups": groups}


def _files(state: State) -> dict[str, int]:
    """File -> bytes, of those that hold values."""
    stored = (values for values in state.every() if isinstance(values, Stored))
    files = {record.file for values in stored for record in values.records()}
    return {file.name: file.stat().st_size for file in sorted(files)}


def _tensor(state: State, name: str, values: Values) -> dict[str, Any]:
    trained = name in state.trained() if state.optimizer else None
    files = {record.file for record in values.records()} if isinstance(values, Stored) else set()
    shards = {"num_runs": len(values.runs), "num_files": len(files)} if isinstance(values, Stored) else {}
    kind = {"trained": trained, "buffer": name in state.buffers if state.buffers is not None else None}
    return {"shape": list(values.shape), "dtype": _name(values.dtype), "bytes": num_bytes(values), **shards, **kind}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def differences(one: State, other: State) -> dict[str, Any]:
    """Names that only one has, and for each common tensor that differs: how. Values of two dtypes are compared in fp32."""
    mine, theirs = _named(one), _named(other)
    ledger = Ledger()
    changed = {}
    for name in mine.keys() & theirs.keys():
        if found := _difference(mine[name], theirs[name], ledger):
            changed[name] = found
    ledger.check(lambda _done, _total: None)
    found = {
        "only_first": sorted(mine.keys() - theirs.keys()),
        "only_second": sorted(theirs.keys() - mine.keys()),
        "changed": dict(sorted(changed.items())),
    }
    return {"same": not any(found.values()), **found}


def _named(state: State) -> dict[str, Values]:
    """Weights under every name they have, the optimiser's states as `<parameter>/<state>`."""
    found = dict(state.tensors) | {name: state.tensors[kept] for name, kept in state.aliases.items()}
    for name, states in (state.optimizer.state if state.optimizer else {}).items():
        found |= {f"{name}/{key}": values for key, values in states.items()}
    return found


def _difference(one: Values, other: Values, ledger: Ledger) -> dict[str, Any]:
    if one.shape != other.shape:
        return {"shapes": [list(one.shape), list(other.shape)]}
    count, largest = 0, 0.0
    for start, size in stretches(one if one.dtype.itemsize >= other.dtype.itemsize else other):
        pair = [torch.empty(size, dtype=values.dtype) for values in (one, other)]
        for values, into in zip((one, other), pair, strict=True):
            values.read(start, into, ledger)
        apart = (pair[0].double() - pair[1].double()).abs()
        apart[apart.isnan()] = float("inf")
        count += int((apart > 0).sum())
        largest = max(largest, float(apart.max()) if size else 0.0)
    dtypes: dict[str, Any] = {"dtypes": [_name(one.dtype), _name(other.dtype)]} if one.dtype != other.dtype else {}
    apart_by: dict[str, Any] = {"num_different": count, "largest_difference": largest} if count else {}
    return dtypes | apart_by


def _lines(told: Mapping[str, Any]) -> Iterator[str]:
    where = f"{told['format']} {told['path']}"
    step = "" if told["step"] is None else f", step {told['step']}"
    stage = "" if told["zero_stage"] is None else f", ZeRO-{told['zero_stage']}"
    yield f"{where}{step}, {told['num_ranks']} rank(s){stage}"
    yield (
        f"{told['num_tensors']} tensors, {show_count(told['num_elements'])} elements, {show_bytes(told['weights_bytes'])}"
    )
    optimizer = told["optimizer"]
    if optimizer is not None:
        yield f"optimiser: {', '.join(optimizer['states'])}, {show_bytes(optimizer['bytes'])}"
        for group in optimizer["groups"]:
            settings = ", ".join(f"{key} {group[key]}" for key in ("lr", "weight_decay", "betas") if key in group)
            yield f"  group of {group['num_parameters']} parameters: {settings}"
    for file, size in told["files"].items():
        yield f"  {show_bytes(size):>10}  {file}"
    for name, kept in told["tied"].items():
        yield f"  {name} is tied to {kept}"


def _table(told: Mapping[str, Any]) -> Table:
    table = Table("tensor", "shape", "dtype", "size", "files")
    for name, one in told["tensors"].items():
        size = show_bytes(one["bytes"])
        table.add_row(name, "x".join(map(str, one["shape"])), one["dtype"], size, str(one.get("num_files", "")))
    return table


def _difference_lines(found: Mapping[str, Any]) -> Iterator[str]:
    for name in found["only_first"]:
        yield f"only in the first: {name}"
    for name in found["only_second"]:
        yield f"only in the second: {name}"
    for name, how in found["changed"].items():
        yield f"{name}: " + ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in how.items())
    yield "the same" if found["same"] else "different"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fleetune inspect", description=str(__doc__).partition("\n")[0])
    parser.add_argument("path", help="zero:, universal:, dcp:, hf:, torch: or peft: and a path; most need no prefix")
    parser.add_argument("--diff", metavar="OTHER", help="compare names, shapes, dtypes and every value with another")
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(argv)
    try:
        told = describe(first := locate_source(options.path))
        if options.diff:
            told = differences(first.state, locate_source(options.diff).state)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    if options.json:
        sys.stdout.write(json.dumps(told, indent=1, default=str) + "\n")
    elif options.diff:
        sys.stdout.write("\n".join(_difference_lines(told)) + "\n")
    else:
        sys.stdout.write("\n".join(_lines(told)) + "\n")
        Console(width=160 if not sys.stdout.isatty() else None).print(_table(told))
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(main())
