"""The arrows between the rooms point down, the deciding rooms stay light, and each door to the outside is one file."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import packages_distributions

import pytest

from tests.architecture.imports import PACKAGES, all_imports, modules, syntax
from tests.support import REPO

# Room -> the rooms it may import. A module belongs to the longest room that begins its name.
ARROWS: dict[str, set[str]] = {
    "launcher": set(),
    "launcher.errors": set(),
    "launcher.units": set(),
    "launcher.spawn": set(),
    "launcher.checksum": set(),
    "launcher.picture": {"launcher.errors"},
    "launcher.stored": {"launcher.errors"},
    "launcher.job": {"launcher.errors", "launcher.units"},
    "launcher.task": {"launcher.job", "launcher.errors"},
    "launcher.data": {"launcher.spawn", "launcher.task", "launcher.checksum", "launcher.job", "launcher.errors"},
    "launcher.cost": {"launcher.cost.values"},
    "launcher.cost.values": {"launcher.errors", "launcher.units"},
    "launcher.cost.cache": {"launcher.cost.values", "launcher.job", "launcher.spawn", "launcher.errors"},
    "launcher.cost.architecture": {"launcher.job", "launcher.spawn", "launcher.errors"},
    "launcher.cost.trainable": {"launcher.cost.architecture", "launcher.job", "launcher.errors"},
    "launcher.cost.kernels": set(),
    "launcher.cost.live": {"launcher.cost.kernels"},
    "launcher.cost.fit": {"launcher.cost.values"},
    "launcher.cost.trace": {"launcher.cost.architecture", "launcher.cost.live", "launcher.task"},
    "launcher.cost.reduced": {"launcher.cost.architecture", "launcher.cost.trace"},
    "launcher.cost.measure": {
        "launcher.cost.fit",
        "launcher.cost.kernels",
        "launcher.cost.reduced",
        "launcher.cost.trace",
        "launcher.cost.values",
        "launcher.cost.architecture",
        "launcher.cost.trainable",
        "launcher.data.tokenizer",
        "launcher.task",
        "launcher.job",
        "launcher.errors",
    },
    "launcher.plan": {"launcher.cost.values", "launcher.job", "launcher.errors", "launcher.units"},
    "launcher.emit": {"launcher.plan", "launcher.job", "launcher.errors", "launcher.units"},
    "launcher.train": {
        "launcher.emit",
        "launcher.plan",
        "launcher.data",
        "launcher.task",
        "launcher.cost.architecture",
        "launcher.cost.trainable",
        "launcher.stored",
        "launcher.checksum",
        "launcher.job",
        "launcher.errors",
        "launcher.units",
    },
    "launcher.run": {
        "launcher.attempt",
        "launcher.train",
        "launcher.emit",
        "launcher.plan",
        "launcher.cost",
        "launcher.data",
        "launcher.task",
        "launcher.job",
        "launcher.spawn",
        "launcher.errors",
        "launcher.units",
    },
    "launcher.attempt": {
        "launcher.cost.cache",
        "launcher.plan",
        "launcher.job",
        "launcher.spawn",
        "launcher.errors",
        "launcher.units",
    },
    "launcher.node": {"launcher.attempt", "launcher.emit", "launcher.job", "launcher.spawn", "launcher.errors"},
    "launcher.scheduled": {"launcher.attempt", "launcher.job", "launcher.spawn", "launcher.errors"},
    "launcher.doctor": {"launcher.job", "launcher.spawn", "launcher.errors", "launcher.units"},
    "launcher.command": {
        "launcher.attempt",
        "launcher.doctor",
        "launcher.run",
        "launcher.train",
        "launcher.emit",
        "launcher.plan",
        "launcher.cost",
        "launcher.data",
        "launcher.task",
        "launcher.job",
        "launcher.picture",
        "launcher.spawn",
        "launcher.errors",
        "launcher.units",
        "tools",
    },
    "launcher.cli": {"launcher.command", "launcher.errors"},
    "launcher.__main__": {"launcher.cli"},
    "tools": {"launcher"},
}
# What a room may import from outside the standard library, where that is counted.
LIGHT: dict[str, set[str]] = {
    "launcher.errors": set(),
    "launcher.units": set(),
    "launcher.spawn": {"psutil"},
    "launcher.checksum": set(),
    "launcher.job": {"pydantic", "yaml"},
    "launcher.cost.values": set(),
    "launcher.cost.cache": set(),
    "launcher.plan": set(),
    "launcher.emit": {"yaml"},
    "launcher.attempt": set(),
    "launcher.node": set(),
    "launcher.scheduled": set(),
    "launcher.doctor.values": set(),
    "launcher.doctor.fit": set(),
    "launcher.doctor.cluster_file": {"yaml"},
}
STARTS_PROCESSES = {"launcher/spawn.py"}
READS_ENVIRONMENT = {
    "launcher/job/resources.py": "XDG_CACHE_HOME, where the cache lies",
    "launcher/spawn.py": "a child inherits it",
    "launcher/node.py": "the number of its node, as srun tells it, and TMPDIR, which is made",
    "launcher/scheduled.py": "the number of its job, as Slurm tells it",
    "launcher/command/launch_hosts.py": "what of it goes to ranks elsewhere",
    "launcher/run.py": "hands it to World.detect, which takes any mapping; a rank that failed early asks for RANK",
    "tools/evaluate.py": "hands it to World.detect, which takes any mapping",
    "tools/bench/_ranks.py": "torch and DeepSpeed look there for the facts of the one rank",
    "launcher/cost/measure.py": "a process of its own: keeps transformers from writing into its answer",
}


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def room_of(name: str) -> str:
    return max((room for room in ARROWS if within(name, room)), key=len)


def is_ours(name: str) -> bool:
    return name.split(".")[0] in PACKAGES


def breaches() -> list[str]:
    return [
        f"{importer}:{line} imports {imported}"
        for importer, line, imported in all_imports()
        if is_ours(imported) and not is_allowed(room_of(importer), imported)
    ]


def is_allowed(room: str, imported: str) -> bool:
    """Inside a room everything may; `cost` and `launcher` are the one exception: their parts are rooms of their own."""
    if room == "tools" and (within(imported, "launcher.cli") or within(imported, "launcher.command")):
        return False
    return room_of(imported) == room or any(within(imported, allowed) for allowed in ARROWS[room])


def test_every_import_follows_an_arrow() -> None:
    """Also the imports inside functions."""
    assert breaches() == []


def test_every_module_is_in_a_room() -> None:
    """A new module directly under launcher/, or a new room, is given its arrows here before it is used."""
    assert [name for name in modules() if room_of(name) == "launcher" and name != "launcher"] == []


def test_the_rooms_make_no_circle() -> None:
    """The arrows themselves, whatever is imported today, can be put in an order."""
    rooms = [room for room in ARROWS if room not in ("launcher", "launcher.cost", "launcher.__main__")]
    below = {room: {other for other in rooms if other != room and is_allowed(room, other)} for room in rooms}
    while below:
        lowest = {room for room, others in below.items() if not others & set(below)}
        assert lowest, f"a circle among {sorted(below)}"
        below = {room: others for room, others in below.items() if room not in lowest}


@pytest.mark.parametrize("room", sorted(LIGHT))
def test_deciding_rooms_import_nothing_heavy(room: str) -> None:
    """Not torch, transformers, deepspeed or numpy, nor anything else that a login node would wait for."""
    allowed = LIGHT[room] | set(sys.stdlib_module_names)
    heavy = [
        f"{importer}:{line} imports {imported}"
        for importer, line, imported in all_imports()
        if within(importer, room) and not is_ours(imported) and imported.split(".")[0] not in allowed
    ]
    assert heavy == []


def test_processes_are_started_by_one_file() -> None:
    """`subprocess`, `multiprocessing` and os.exec and its kin appear in `launcher/spawn.py` and nowhere else."""
    starters = ("exec", "spawn", "posix_spawn", "fork", "popen", "system", "startfile")
    assert {
        place
        for place, used in os_attributes()
        if used in ("subprocess", "multiprocessing") or used.startswith(starters)
    } == STARTS_PROCESSES


def test_the_environment_is_read_where_it_is_said() -> None:
    """Each file that touches `os.environ` has its reason in the table above."""
    assert {place for place, used in os_attributes() if used in ("environ", "environb", "getenv", "putenv")} == set(
        READS_ENVIRONMENT
    )


def os_attributes() -> set[tuple[str, str]]:
    """(file, word): the attributes of `os` that it uses, and `subprocess` or `multiprocessing` where it imports them."""
    files = modules()
    found = {
        (str(files[importer].relative_to(REPO)), word)
        for importer, _, imported in all_imports()
        for word in {"subprocess", "multiprocessing"} & set(imported.split("."))
    }
    for path in files.values():
        place = str(path.relative_to(REPO))
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                found.add((place, node.attr))
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                found |= {(place, alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize("folder", PACKAGES)
def test_no_name_hides_another(folder: str) -> None:
    """`deepspeed launcher/run.py` puts launcher/ first on sys.path: a profile.py there would break cProfile."""
    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    ours = {path.stem if path.suffix == ".py" else path.name for path in (REPO / folder).iterdir()}
    # tools/ is only ever run with -m, so its evaluate.py is never the `evaluate` that comes with lm-eval
    assert ours & taken - {"__init__", "__main__", "evaluate"} == set()
