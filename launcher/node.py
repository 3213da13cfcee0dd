"""What every node of a job on several machines starts: compare with the other nodes, then the node's own launcher.

The launcher is torchrun, or DeepSpeed's for one node. Above it this process hands stop signals to the ranks, hears when
another node fails, and takes the ranks down then: none waits half an hour in a collective for one that is gone.
Neither reads nor prints more of the environment than the rank of the node.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Starting a file puts its own folder first on sys.path, where launcher's modules could shadow others' names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import json
import os
import platform
import threading
import time

from launcher.attempt.channel import Head, Member
from launcher.attempt.preflight import Facts, facts_of_this_node
from launcher.attempt.records import clear_records, read_records
from launcher.attempt.watch import RankWatch
from launcher.emit.argv import NodeStart, node_launcher
from launcher.errors import EXIT_OURS, EXIT_PREEMPTED, FleetuneError, UserError
from launcher.job import load_spec
from launcher.spawn import Ranks


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    node = int(os.environ["SLURM_NODEID"]) if options.node is None else options.node
    try:
        return _run(options, node)
    except FleetuneError as error:
        if node == 0 or not isinstance(error, UserError):  # a mistake of the user's is told once, by the first node
            sys.stderr.write(f"error: {error}\n")
        if node == 0:
            _write_outcome(options, error)
        return error.exit_code


def _write_outcome(options: argparse.Namespace, error: FleetuneError) -> None:
    """Where whoever started this looks for the run's own word; there is no such place when the spec cannot be read."""
    with contextlib.suppress(UserError, OSError):
        folder = Path(load_spec(options.spec, options.set).output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        outcome = {"exit_code": error.exit_code, "message": str(error), "time": time.time()}
        (folder / "outcome.json").write_text(json.dumps(outcome))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Start the ranks of one node; `fleetune launch` writes such commands.")
    parser.add_argument("--nodes", required=True, help="how many, or MIN:MAX for torchrun's elastic mode")
    parser.add_argument("--node", type=int, help="number of this node; left out, SLURM_NODEID")
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--head", required=True, help="the first node, as the others reach it")
    parser.add_argument(
        "--port", type=int, required=True, help="for the launcher; the next one is for the nodes themselves"
    )
    parser.add_argument("--id", required=True, help="names the attempt, so that two jobs never mix")
    parser.add_argument("--launcher", choices=("torchrun", "deepspeed"), default="torchrun")
    parser.add_argument("--world-info", default="", help="deepspeed: its own word on hosts and slots")
    parser.add_argument(
        "--leash", action="store_true", help="read standard input: `stop` asks ranks to save, its end ends them"
    )
    parser.add_argument("--spec", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    return parser


def _run(options: argparse.Namespace, node: int) -> int:
    spec = load_spec(options.spec, options.set)
    output_dir = Path(spec.output_dir)
    start = NodeStart(
        options.nodes,
        node,
        options.ranks_per_node,
        options.head,
        options.port,
        options.id,
        options.launcher,
        options.world_info,
        spec.launch.max_restarts,
    )
    if node == 0:
        clear_records(output_dir)
    if scratch := os.environ.get("TMPDIR"):  # on a local disk of this node, where a site has one
        Path(scratch).mkdir(parents=True, exist_ok=True)
    if start.is_elastic:  # who is there changes: torchrun meets whoever comes, and ranks plan for them
        return _start(start, options, output_dir, None)
    num_nodes = int(options.nodes)
    facts = facts_of_this_node(options.spec, options.set, num_nodes, options.ranks_per_node)
    return _start(start, options, output_dir, _joined(start, num_nodes, facts))


def _joined(start: NodeStart, num_nodes: int, facts: Facts) -> Head | Member:
    if start.node == 0:
        return Head(start.port + 1, start.run_id, num_nodes, facts)
    return Member(start.head, start.port + 1, start.run_id, start.node, facts)


def _start(start: NodeStart, options: argparse.Namespace, output_dir: Path, others: Head | Member | None) -> int:
    argv, environment = node_launcher(start, options.spec, tuple(options.set))
    watch = RankWatch(output_dir)
    with Ranks(argv, environment) as ranks:
        if others is not None:
            others.watch(lambda words: _down(ranks, words))
        if options.leash:
            threading.Thread(target=_obey, args=(ranks,), daemon=True).start()

        def look(pid: int) -> None:
            watch.look(pid)
            if start.is_elastic and watch.has_stopped:  # torchrun would take 75 for a failure, and start ranks again
                ranks.take_down(at_once=True)

        code = ranks.wait(look)
    watch.ended(code)
    failure = str(watch.failure) if watch.failure else None
    if others is not None:
        others.leave(failure or (f"its launcher ended with {code}" if code and not _stopped(output_dir) else None))
    return code if code in (0, EXIT_PREEMPTED) else EXIT_OURS


def _down(ranks: Ranks, words: str) -> None:
    sys.stderr.write(f"fleetune: {platform.node()} takes its ranks down: {words}\n")
    ranks.take_down()


def _obey(ranks: Ranks) -> None:
    """The one who started this node holds the other end of its standard input, and is gone when that ends."""
    for line in sys.stdin:
        if line.strip() == "stop":
            ranks.stop()
    ranks.take_down()


def _stopped(output_dir: Path) -> bool:
    """Told to stop, ranks save and leave one after another: no failure that others must hear of."""
    here = [record for record in read_records(output_dir) if record.host == platform.node()]
    return bool(here) and all(record.state in ("stopped", "done") for record in here)


if __name__ == "__main__":
    raise SystemExit(main())
