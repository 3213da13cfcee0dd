"""What every rank starts: `deepspeed launcher/run.py --spec job.yaml`, `torchrun ...`, `python ...` and srun alike.

Bootstrap only: find out who this rank is, agree on the plan, train, and leave with the exit code that says how it went.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Starting a file puts its own folder first on sys.path, where launcher's modules could shadow others' names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import logging
import os
import platform
import time

from launcher.attempt.records import RankRecord, State, write_record
from launcher.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_OURS,
    EXIT_PREEMPTED,
    FleetuneError,
    Preempted,
    UserError,
)
from launcher.job import JobSpec, load_cluster, load_spec


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        spec = load_spec(arguments.spec, arguments.set)
    except UserError as error:
        return _leave(None, error)
    try:
        _train(spec)
    except FleetuneError as error:
        return _leave(spec, error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:  # the entry point: whatever it is, it is ours, and is written down
        logging.getLogger("fleetune").exception("rank failed")
        return _leave(spec, error)
    return _leave(spec, None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train one rank of a job; see `fleetune launch` for starting all.")
    parser.add_argument("--spec", required=True, help="job spec in YAML")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the spec")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="given by the deepspeed launcher; not used")
    return parser


def _train(spec: JobSpec) -> None:
    import torch

    from launcher.train.loop import train
    from launcher.train.preempt import StopFlag
    from launcher.train.report import open_rank_log
    from launcher.train.world import World, rank_device, start_process_group, tell_libraries

    stop = StopFlag()
    stop.install(lambda: os._exit(_leave(spec, Preempted("told to stop before the first step: nothing is lost"))))
    world = World.detect(os.environ)
    tell_libraries(world, os.environ)
    open_rank_log(Path(spec.output_dir), world.rank)
    _note(spec, "running")
    spec = _for_this_world(spec, world.nodes, world.ranks_per_node)
    device = rank_device(world, load_cluster(spec.cluster.name).gpu.kind)
    start_process_group(world, device)
    try:
        plan = _agreed_plan(spec)
        train(spec, plan, world, device, stop)
    finally:
        if sys.exc_info()[0] is None or issubclass(sys.exc_info()[0] or object, UserError | Preempted):
            torch.distributed.destroy_process_group()  # after any other failure no rank may wait for another


def _for_this_world(spec: JobSpec, nodes: int, ranks_per_node: int) -> JobSpec:
    """The launcher's word on the number of ranks wins; the plan is made for it, with the same global batch."""
    cluster = spec.cluster.model_copy(update={"nodes": nodes, "gpus_per_node": ranks_per_node})
    if cluster != spec.cluster:
        asked = f"{spec.cluster.nodes} x {spec.cluster.gpus_per_node}"
        logging.getLogger("fleetune").warning(
            "the spec says %s ranks, the launcher started %s x %s: planning for these", asked, nodes, ranks_per_node
        )
    return spec.model_copy(update={"cluster": cluster})


def _agreed_plan(spec: JobSpec):  # type: ignore[no-untyped-def]  # Plan, imported late
    from launcher.cost.cache import cached_cost
    from launcher.emit import check_runnable
    from launcher.job.packages import check_packages
    from launcher.plan import make_plan
    from launcher.train.agree import decide_on_first

    def decide():  # type: ignore[no-untyped-def]
        check_packages(spec)
        plan = make_plan(spec, cached_cost(spec), load_cluster(spec.cluster.name))
        check_runnable(spec, plan)
        folder = Path(spec.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(json.dumps(plan.to_json(), indent=1))
        return plan

    return decide_on_first(decide)


def _leave(spec: JobSpec | None, error: Exception | None) -> int:
    """Say what happened on rank 0, and write it where `fleetune launch` finds it behind any launcher's own code."""
    code = EXIT_DONE if error is None else getattr(error, "exit_code", EXIT_OURS)
    words = _words(error) if error else "done"
    if spec is not None:
        _note(spec, _STATES.get(code, "failed"), words, code)
    if os.environ.get("RANK", "0") != "0":
        return code
    if error is not None:
        print(f"{'stopped' if isinstance(error, Preempted) else 'error'}: {words}", file=sys.stderr)  # noqa: T201
    if spec is not None:
        outcome = {"exit_code": code, "message": words, "time": time.time()}
        (Path(spec.output_dir) / "outcome.json").write_text(json.dumps(outcome))
    return code


_STATES: dict[int, State] = {EXIT_DONE: "done", EXIT_PREEMPTED: "stopped"}


def _note(spec: JobSpec, state: State, words: str = "", code: int = EXIT_DONE) -> None:
    """For the one who looks for the first of several failures."""
    rank = int(os.environ.get("RANK", "0"))
    write_record(Path(spec.output_dir), RankRecord(rank, platform.node(), os.getpid(), state, time.time(), words, code))


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, FleetuneError) else f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    raise SystemExit(main())
