"""The run's folder: checkpoints in the engine's own format."""

from __future__ import annotations

from launcher.cost.values import ModelCost
from launcher.plan.layout import FP32, Layout
from launcher.plan.memory.shards import by_elements, by_group
from launcher.plan.memory.torch_state import state_bytes
from launcher.plan.values import Item, Memory


def checkpoint_disk(cost: ModelCost, layout: Layout, keep_last: int) -> Memory:
    """`keep_last` complete checkpoints and the one being written. What the file system holds is not known here."""
    copies = keep_last + 1
    formulas, source = _checkpoint(cost, layout)
    items = [Item(name, copies * size, f"{copies} x {words}", source) for name, size, words in formulas]
    return Memory(tuple(item for item in items if item.num_bytes), None, "disk")


def _checkpoint(cost: ModelCost, layout: Layout) -> tuple[list[tuple[str, int, str]], str]:
    """Bytes of one, over all ranks."""
    if layout.engine == "torch":
        kept = state_bytes(layout)
        model, optimiser = kept * cost.num_params, 2 * kept * cost.num_trainable_params
        return [
            ("model", model, f"{kept} P"),
            ("optimiser", optimiser, f"{2 * kept} P'"),
        ], "launcher/train/torch_engine.py save: DCP, each element once"
    ranks, element = layout.num_ranks, layout.element_bytes
    source = "deepspeed runtime/engine.py save_checkpoint"
    if layout.strategy in ("zero1", "zero2"):
        part = by_group(cost, ranks)
        return [
            ("model", element * cost.num_params, "p P"),
            ("optimiser", 3 * FP32 * ranks * part.trained, "12 P': masters, moments"),
        ], source
    held = by_elements(cost, ranks)
    return [
        ("frozen", element * ranks * held.frozen, "p x what is frozen"),
        ("optimiser", 3 * FP32 * ranks * held.trained, "12 P': masters, moments"),
    ], source
