"""Machines by name: a hostfile or a list, filtered as DeepSpeed filters them, and the order of ranks on them.

The grammar is DeepSpeed's (`deepspeed/launcher/runner.py`): `name slots=N` per line; `n1@n2:0,2` in a filter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ABSENT, Problem, SpecError
from launcher.job.spec import LaunchSection

# What ssh takes for a machine and no shell or option parser takes for anything else.
_NAME = re.compile(r"([A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9_][\w.-]*", re.ASCII)
_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(#.*)?")
_NAME_RULE = "is not the name of a machine"
_NAME_WAY_OUT = "write letters, digits, `.`, `_` and `-`, with `user@` before it where needed"


@dataclass(frozen=True)
class Host:
    name: str
    """`name` or `user@name`, as ssh takes it."""
    slots: tuple[int, ...]
    """Numbers of the accelerators to use."""

    @property
    def address(self) -> str:
        return self.name.rpartition("@")[2]


@dataclass(frozen=True)
class Place:
    """Where one rank runs."""

    rank: int
    host: str
    local_rank: int
    slot: int


def hosts_of(launch: LaunchSection, gpus_per_node: int) -> tuple[Host, ...]:
    """The machines that `launch` names, in order; () where it names none. Raises `SpecError`."""
    if launch.hostfile is not None:
        found = _read(Path(launch.hostfile))
    elif launch.hosts is not None:
        found = tuple(Host(name, tuple(range(gpus_per_node))) for name in _distinct(launch.hosts))
    else:
        return ()
    return filtered(found, launch.include, launch.exclude)


def _distinct(names: Iterable[str]) -> list[str]:
    seen: list[str] = []
    for name in names:
        if not _NAME.fullmatch(name):
            raise SpecError("launch.hosts", name, _NAME_RULE, _NAME_WAY_OUT)
        if name in seen:
            raise SpecError("launch.hosts", name, "is named twice", "name every machine once")
        seen.append(name)
    return seen


def _read(path: Path) -> tuple[Host, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        way_out = "give the path of a hostfile"
        raise SpecError("launch.hostfile", str(path), f"cannot be read ({reason})", way_out) from None
    return parse_hostfile(text, str(path))


def parse_hostfile(text: str, path: str) -> tuple[Host, ...]:
    """Every line that is wrong is told at once. Raises `SpecError`."""
    hosts: dict[str, Host] = {}
    problems: list[Problem] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.strip()
        if not words or words.startswith("#"):
            continue
        host = _line(words, hosts, Problem(f"{path}:{number}", words, "", ""))
        if isinstance(host, Problem):
            problems.append(host)
        else:
            hosts[host.name] = host
    if problems:
        raise SpecError.several(problems)
    if not hosts:
        raise SpecError(path, ABSENT, "names no machine", "write one `name slots=8` per line")
    return tuple(hosts.values())


def _line(words: str, known: dict[str, Host], blank: Problem) -> Host | Problem:
    match = _LINE.fullmatch(words)
    if match is None:
        return blank._replace(rule="is not of the form `name slots=N`", way_out="write e.g. `node1 slots=8`")
    name, slots = match[1], int(match[2])
    if not _NAME.fullmatch(name):
        return blank._replace(value=name, rule=_NAME_RULE, way_out=_NAME_WAY_OUT)
    if name in known:
        return blank._replace(value=name, rule="is named twice", way_out="give all its slots in one line")
    if slots == 0:
        return blank._replace(value=name, rule="has no slots", way_out="remove the line, or give it slots")
    if slots > 1024:
        return blank._replace(value=name, rule=f"has {slots} slots, more than any machine", way_out="mend the number")
    return Host(name, tuple(range(slots)))


def filtered(hosts: tuple[Host, ...], include: str | None, exclude: str | None) -> tuple[Host, ...]:
    """Raises `SpecError` for a machine or slot that is not among them, and where nothing is left."""
    if include is None and exclude is None:
        return hosts
    key, text = ("launch.include", include) if include is not None else ("launch.exclude", exclude or "")
    named = dict(_filter(key, text or "", {host.name: host for host in hosts}))
    kept = [_kept(host, named.get(host.name), include is not None) for host in hosts]
    left = tuple(host for host in kept if host.slots)
    if not left:
        raise SpecError(key, text, "leaves no machine", "name fewer" if exclude else "name some")
    return left


def _kept(host: Host, named: tuple[int, ...] | None, is_include: bool) -> Host:
    told = () if named is None else (named or host.slots)
    return Host(host.name, tuple(slot for slot in host.slots if (slot in told) == is_include))


def _filter(key: str, text: str, hosts: dict[str, Host]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part in text.split("@"):
        name, colon, slots = part.partition(":")
        if name not in hosts:
            raise SpecError(key, name, "is no machine of the list", f"known: {_some(list(hosts))}")
        numbers = slots.split(",") if colon else []
        if not all(number.isdigit() for number in numbers):
            raise SpecError(key, part, "is not of the form `name` or `name:0,2`", "write e.g. n1@n2:0,2")
        if beyond := [number for number in numbers if int(number) not in hosts[name].slots]:
            way_out = f"it has 0 to {hosts[name].slots[-1]}"
            raise SpecError(key, part, f"names slot {beyond[0]}, which {name} does not have", way_out)
        yield name, tuple(map(int, numbers))


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def ranks_per_host(hosts: tuple[Host, ...]) -> int:
    """The same on all; raises `SpecError` where it is not: shards and batches are cut evenly."""
    first = hosts[0]
    for host in hosts[1:]:
        if len(host.slots) != len(first.slots):
            rule = f"gives {first.name} {len(first.slots)} ranks and {host.name} {len(host.slots)}"
            way_out = "give every machine as many slots, or take some away with launch.exclude"
            raise SpecError("launch.hostfile", ABSENT, rule, way_out)
    return len(first.slots)


def rank_table(hosts: tuple[Host, ...]) -> list[Place]:
    """Rank by rank, machine after machine, as DeepSpeed counts and as torchrun does with numbered nodes."""
    width = ranks_per_host(hosts)
    return [
        Place(node * width + local_rank, host.name, local_rank, slot)
        for node, host in enumerate(hosts)
        for local_rank, slot in enumerate(host.slots)
    ]
