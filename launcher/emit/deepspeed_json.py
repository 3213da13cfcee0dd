"""The DeepSpeed configuration of a plan: complete, with nothing left to `auto`.

A preset (`ds_configs/*.json`, or a file of the user's) holds the keys that are tuned by hand. A key that the planner
derives is refused there: two places for one number is how such settings come to contradict each other.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from launcher.emit.offload import offload_sections
from launcher.errors import ABSENT, Problem, SpecError
from launcher.job.resources import resource_dir
from launcher.job.spec import JobSpec
from launcher.plan.layout import Layout
from launcher.plan.memory import REDUCE_BUCKET_ELEMENTS
from launcher.plan.memory.zero import SUB_GROUP_ELEMENTS
from launcher.plan.values import Plan

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "hpz": 3}

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
    "zero_optimization.zero_hpz_partition_size": "set parallel.shard_group_size",
    "zero_optimization.offload_optimizer": "set parallel.offload_optimizer",
    "zero_optimization.offload_param": "set parallel.offload_params",
    "zero_optimization.sub_group_size": "its bytes are part of the plan",
    "zero_allow_untested_optimizer": "set training.optimizer",
    "zero_force_ds_cpu_optimizer": "the optimiser is chosen by what the machine can build",
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
    "aio",
    "communication_data_type",
    "steps_per_print",
    "wall_clock_breakdown",
}


def load_preset(spec: JobSpec, layout: Layout) -> dict[str, Any]:
    """The hand-tunable keys for a layout: the spec's preset, or the one of `ds_configs/` that is made for it."""
    name = spec.parallel.deepspeed_preset or _preset_name(layout)
    path = Path(name) if "/" in name or name.endswith(".json") else resource_dir("ds_configs") / f"{name}.json"
    preset = _read(path, name)
    problems = [problem for key in _flat(preset) if (problem := _refusal(str(path), key, _flat(preset)[key]))]
    if problems:
        raise SpecError.several(problems)
    return preset


def _preset_name(layout: Layout) -> str:
    places = (layout.offload_optimizer, layout.offload_params)
    if layout.strategy != "zero3" or places == ("none", "none"):
        return layout.strategy
    return "zero3-nvme" if "nvme" in places else "zero3-cpu-offload"


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
    layout = plan.chosen.layout
    derived = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.accumulation_steps,
        "gradient_clipping": spec.training.max_grad_norm or 0.0,
        **_precision(layout),
    }
    if layout.offload_optimizer != "none":
        derived["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW does where DeepSpeed's cannot be compiled
    if spec.training.optimizer != "adamw":
        derived["zero_allow_untested_optimizer"] = True  # tested here: lion and sgd are elementwise, so pieces will do
    zero = {
        **preset.get("zero_optimization", {}),
        "stage": STAGES[layout.strategy],
        "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS,
        "allgather_bucket_size": REDUCE_BUCKET_ELEMENTS,
        **({"sub_group_size": SUB_GROUP_ELEMENTS} if STAGES[layout.strategy] == 3 else {}),
        **({"zero_hpz_partition_size": layout.shard_group_size} if layout.strategy == "hpz" else {}),
        **offload_sections(layout, spec, pinned=plan.device == "cuda"),
    }
    return {**preset, **derived, "zero_optimization": zero}


LOSS_SCALE = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}
"""fp16: a scale that falls with every overflow (after one that is forgiven) and doubles after 1,000 steps without."""


def _precision(layout: Layout) -> dict[str, Any]:
    bf16 = {"bf16": {"enabled": layout.precision == "bf16"}}
    if layout.precision != "fp16":
        return bf16
    return {**bf16, "fp16": {"enabled": True, **LOSS_SCALE, "min_loss_scale": 1}}
