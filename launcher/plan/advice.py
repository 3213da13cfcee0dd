"""What to change where nothing fits: the smallest change that does, found by trying.

In the order of what they cost the user: letting go of a key he fixed, fewer ranks on a node, more ranks, shorter sequences, adapters. Each is
planned as it would be; nothing is offered that was not found to fit. Adapters are another model, whose cost is measured
like any other; where it cannot be, they are not offered.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from launcher.cost.values import ModelCost
from launcher.errors import PlanError, UserError
from launcher.job.cluster import Cluster
from launcher.job.spec import JobSpec
from launcher.plan.knobs import divisors
from launcher.plan.search import Search
from launcher.plan.values import Candidate
from launcher.units import show_bytes, show_time

CostOf = Callable[[JobSpec], ModelCost]
FREED = (
    "micro_batch_size",
    "recompute",
    "reshard_after_forward",
    "shard_group_size",
    "offload_optimizer",
    "offload_params",
    "strategy",
)
"""Keys that may be let go, least consequence first; the precision is not among them: it changes the numbers."""
MOST_RANKS = 2**20
LENGTH_STEP = 64
"""Lengths offered are multiples of so many tokens; of fewer where the sequence has less than eight times as many."""


class Change(NamedTuple):
    """Overrides that make the job fit, and the layout that then is best."""

    overrides: tuple[str, ...]
    best: Candidate

    def __str__(self) -> str:
        keys = " ".join(f"--set {override}" for override in self.overrides)
        room = f"{show_bytes(self.best.memory.total_bytes)} of {show_bytes(self.best.memory.usable_bytes or 0)}"
        return f"{keys} ({self.best.label}: {room}, {show_time(self.best.step_time.seconds)} per step)"


def nothing_fits(spec: JobSpec, lost: list[Candidate], found: list[Change]) -> PlanError:
    """The error that says how much is missing and what would fit, the smallest change first."""
    smallest = min(lost, key=_excess)
    rule = f"does not fit: {smallest.label} is the smallest, {smallest.shortfall}"
    offers = "; or ".join(map(str, found))
    way_out = f"this would fit: {offers}" if found else "give more ranks (cluster.nodes) or a smaller model"
    return PlanError("parallel", spec.parallel.strategy, rule, way_out)


def _excess(candidate: Candidate) -> float:
    """How many times over the place that is worst off is full."""
    return max(place.total_bytes / max(1, place.usable_bytes or 0) for place in candidate.too_small)


def changes(spec: JobSpec, cost: ModelCost, cluster: Cluster, cost_of: CostOf | None = None) -> Iterator[Change]:
    """One of each kind that helps."""
    for kind in (_freed, _spread, _more_ranks, _shorter):
        yield from kind(spec, cost, cluster)
    if cost_of is not None and spec.method.name == "full":
        adapted = spec.model_copy(update={"method": spec.method.model_copy(update={"name": "lora"})})
        try:
            measured = cost_of(adapted)
        except UserError:
            return  # adapters for which this architecture has no layers
        yield from _tried(adapted, measured, cluster, "method.name=lora")


def _freed(spec: JobSpec, cost: ModelCost, cluster: Cluster) -> Iterator[Change]:
    """The first fixed key without which the job fits, with the value it would take; failing that, all of them."""
    fixed = [key for key in FREED if getattr(spec.parallel, key) != "auto"]
    for keys in [*([key] for key in fixed), *([fixed] if len(fixed) > 1 else [])]:
        freed = _parallel(spec, **dict.fromkeys(keys, "auto"))
        if (best := _best(freed, cost, cluster)) is not None:
            values = {key: getattr(best.layout, key) for key in keys}
            taken = [f"parallel.{key}={_yaml(value)}" for key, value in values.items()]
            # a value is pinned only where the planner can be asked for it: a strategy without groups has no size
            yield Change(tuple(_auto_where_none(taken, values)), best)
            return


def _auto_where_none(taken: list[str], values: dict[str, Any]) -> Iterator[str]:
    for override, (key, value) in zip(taken, values.items(), strict=True):
        yield f"parallel.{key}=auto" if (key, value) == ("shard_group_size", 0) else override


def _spread(spec: JobSpec, cost: ModelCost, cluster: Cluster) -> Iterator[Change]:
    """As many ranks over more nodes, where it is a node's RAM that does not suffice for so many."""
    for per_node in reversed(divisors(spec.cluster.gpus_per_node)[:-1]):
        spread = _machines(spec, spec.num_ranks // per_node, per_node)
        if _fits(spread, cost, cluster):
            named = (f"cluster.gpus_per_node={per_node}", f"cluster.nodes={spec.num_ranks // per_node}")
            yield from _tried(spread, cost, cluster, *named)
            return


def _more_ranks(spec: JobSpec, cost: ModelCost, cluster: Cluster) -> Iterator[Change]:
    """The fewest nodes (on one node, GPUs first) over which the batch divides; else the fewest, with a batch that does."""
    for nodes, per_node in _sizes(spec):
        wider = _machines(spec, nodes, per_node)
        if _fits(wider, cost, cluster):
            named = [f"cluster.gpus_per_node={per_node}"] * (per_node != spec.cluster.gpus_per_node)
            named += [f"cluster.nodes={nodes}"] * (nodes != spec.cluster.nodes)
            yield from _tried(wider, cost, cluster, *named)
            return
    yield from _more_ranks_and_samples(spec, cost, cluster)


def _sizes(spec: JobSpec) -> Iterator[tuple[int, int]]:
    """Nodes and ranks of each, fewest ranks first."""
    micro = spec.parallel.micro_batch_size
    share = spec.training.global_batch_size // (1 if micro == "auto" else micro)
    nodes, per_node = spec.cluster.nodes, spec.cluster.gpus_per_node
    if nodes == 1 and per_node < USUAL_NODE:
        yield from ((1, count) for count in divisors(USUAL_NODE) if count > per_node and share % count == 0)
        per_node = USUAL_NODE
    for count in divisors(share // per_node) if share % per_node == 0 else []:
        if count > nodes:
            yield count, per_node


USUAL_NODE = 8
"""Accelerators of the nodes that most clusters are built of."""


def _more_ranks_and_samples(spec: JobSpec, cost: ModelCost, cluster: Cluster) -> Iterator[Change]:
    """Nodes doubled until it fits, each rank with the smallest batch there is."""
    micro, per_node = spec.parallel.micro_batch_size, max(spec.cluster.gpus_per_node, USUAL_NODE)
    nodes = 1
    while nodes * per_node <= MOST_RANKS:
        batch = nodes * per_node * (1 if micro == "auto" else micro)
        if batch > spec.training.global_batch_size:
            wider = _machines(_training(spec, global_batch_size=batch), nodes, per_node)
            if _fits(wider, cost, cluster):
                named = [f"cluster.gpus_per_node={per_node}"] * (per_node != spec.cluster.gpus_per_node)
                named += [f"cluster.nodes={nodes}"] * (nodes != spec.cluster.nodes)
                yield from _tried(wider, cost, cluster, *named, f"training.global_batch_size={batch}")
                return
        nodes *= 2


def _shorter(spec: JobSpec, cost: ModelCost, cluster: Cluster) -> Iterator[Change]:
    """The largest round length that fits: memory only falls with it."""
    step = max(1, min(LENGTH_STEP, spec.training.seq_len // 8))
    lengths = range(step, spec.training.seq_len, step)
    fitting = bisect_right(lengths, False, key=lambda length: not _fits(_training(spec, seq_len=length), cost, cluster))
    if fitting:
        length = lengths[fitting - 1]
        yield from _tried(_training(spec, seq_len=length), cost, cluster, f"training.seq_len={length}")


def _tried(spec: JobSpec, cost: ModelCost, cluster: Cluster, *overrides: str) -> Iterator[Change]:
    if (best := _best(spec, cost, cluster)) is not None:
        yield Change(overrides, best)


def _best(spec: JobSpec, cost: ModelCost, cluster: Cluster) -> Candidate | None:
    try:
        fitting, _ = Search(spec, cost, cluster).candidates()
    except UserError:
        return None
    return fitting[0] if fitting else None


def _fits(spec: JobSpec, cost: ModelCost, cluster: Cluster) -> bool:
    try:
        return Search(spec, cost, cluster).any_fits()
    except UserError:  # groups that do not divide these ranks, say
        return False


def _parallel(spec: JobSpec, **changed: Any) -> JobSpec:
    return spec.model_copy(update={"parallel": spec.parallel.model_copy(update=changed)})


def _training(spec: JobSpec, **changed: Any) -> JobSpec:
    return spec.model_copy(update={"training": spec.training.model_copy(update=changed)})


def _machines(spec: JobSpec, nodes: int, gpus_per_node: int) -> JobSpec:
    cluster = spec.cluster.model_copy(update={"nodes": nodes, "gpus_per_node": gpus_per_node})
    return spec.model_copy(update={"cluster": cluster})


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
