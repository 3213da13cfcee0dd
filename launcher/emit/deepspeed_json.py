"""The DeepSpeed configuration of a plan: complete, with nothing left to `auto`.

A preset (`ds_configs/*.json`, or a file of the user's) holds the keys that are tuned by hand. A key that the planner
derives is refused there: two places for one number is how such settings come to contradict each other.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from launcher.errors import ABSENT, Problem, SpecError
from launcher.job.resources import resource_dir
from launcher.job.spec import JobSpec
from launcher.plan.memory import REDUCE_BUCKET_ELEMENTS
from launcher.plan.values import Plan

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}

# Key -> what to do instead.
DERIVED = {
    "train_batch_size": "set training.global_batch_size",
    "train_micro_batch_size_per_gpu": "set parallel.micro_batch_size",
    "gradient_accumulation_steps": "set training.global_batch_size and parallel.micro_batch_size",
    "gradient_clipping": "set training.max_grad_norm",
    "fp16": "set parallel.precision",
    "bf16": "set parallel.precision",
    "optimizer": "set the keys of training",
    "scheduler": "set training.schedule",
    "zero_optimization.stage": "set parallel.strategy",
    "zero_optimization.reduce_bucket_size": "its bytes are part of the plan",
    "zero_optimization.allgather_bucket_size": "its bytes are part of the plan",
}
TUNABLE = {
    "zero_optimization.overlap_comm",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.round_robin_gradients",
    "zero_optimization.allgather_partitions",
    "zero_optimization.reduce_scatter",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "communication_data_type",
    "steps_per_print",
    "wall_clock_breakdown",
}


def load_preset(spec: JobSpec, strategy: str) -> dict[str, Any]:
    """The hand-tunable keys for a strategy: the spec's preset, or the one of `ds_configs/` with its name."""
    name = spec.parallel.deepspeed_preset or strategy
    path = Path(name) if "/" in name or name.endswith(".json") else resource_dir("ds_configs") / f"{name}.json"
    preset = _read(path, name)
    problems = [problem for key in _flat(preset) if (problem := _refusal(str(path), key, _flat(preset)[key]))]
    if problems:
        raise SpecError.several(problems)
    return preset


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        preset = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in resource_dir("ds_configs").glob("*.json")))
        rule = "names no DeepSpeed preset"
        raise SpecError("parallel.deepspeed_preset", name, rule, f"known: {known}; or give a JSON file") from None
    except (OSError, ValueError) as error:
        raise SpecError("parallel.deepspeed_preset", name, f"is not valid JSON ({error})", "mend the file") from None
    if not isinstance(preset, dict):
        raise SpecError("parallel.deepspeed_preset", name, "holds no JSON object", 'write {"zero_optimization": {...}}')
    return preset


def _flat(preset: dict[str, Any]) -> dict[str, Any]:
    """`{"zero_optimization": {"stage": 2}}` -> `{"zero_optimization.stage": 2}`; only that section is taken apart."""
    inner = preset.get("zero_optimization", {})
    if not isinstance(inner, dict):
        return preset
    nested = {f"zero_optimization.{key}": value for key, value in inner.items()}
    return {**{key: value for key, value in preset.items() if key != "zero_optimization"}, **nested}


def _refusal(path: str, key: str, value: Any) -> Problem | None:
    if key in DERIVED:
        return Problem(f"{path}: {key}", value, "is derived by the planner", f"remove it here; {DERIVED[key]}")
    if key == "zero_optimization":
        return Problem(f"{path}: {key}", value, "is not a section", 'write {"zero_optimization": {...}}')
    if key not in TUNABLE:
        close = difflib.get_close_matches(key, sorted(TUNABLE), n=1)
        way_out = f"did you mean `{close[0]}`?" if close else f"tunable: {', '.join(sorted(TUNABLE))}"
        return Problem(f"{path}: {key}", ABSENT, "is not a key that is tuned by hand", way_out)
    if value == "auto":
        return Problem(f"{path}: {key}", value, "leaves the value open", "give it, or remove the key for the default")
    return None


def deepspeed_config(plan: Plan, spec: JobSpec, preset: dict[str, Any]) -> dict[str, Any]:
    """What `deepspeed.initialize(config=...)` gets. The optimiser and its schedule are passed as objects instead."""
    chosen = plan.chosen
    derived = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": chosen.layout.micro_batch_size,
        "gradient_accumulation_steps": chosen.layout.accumulation_steps,
        "gradient_clipping": spec.training.max_grad_norm or 0.0,
        "bf16": {"enabled": chosen.layout.precision == "bf16"},
    }
    zero = {
        **preset.get("zero_optimization", {}),
        "stage": STAGES[chosen.strategy],
        "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS,
        "allgather_bucket_size": REDUCE_BUCKET_ELEMENTS,
    }
    return {**preset, **derived, "zero_optimization": zero}
