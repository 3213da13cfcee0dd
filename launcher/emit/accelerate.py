"""The plan as a configuration of Hugging Face `accelerate`, so that a script of the user's own runs under it.

    accelerate launch --config_file DIR/accelerate.yaml train.py

Keys are those of accelerate 1.15 `commands/config/config_args.py` (ClusterConfig) and `commands/launch.py`.
"""

from __future__ import annotations

from typing import Any

import yaml

from launcher.emit.fsdp import STRATEGIES, fsdp_settings
from launcher.plan.layout import Layout
from launcher.plan.values import Plan

PORT = 29500
"""Where the ranks of several nodes meet; on one node accelerate finds a free port."""


def accelerate_config(plan: Plan, deepspeed_file: str) -> str | None:
    """YAML; None where accelerate cannot do it: on CPU it does DDP only and passes over FSDP and DeepSpeed (`state.py`).

    deepspeed_file: path of the emitted `deepspeed.json` as the script's ranks see it.
    """
    layout = plan.chosen.layout
    if plan.device == "cpu" and layout.strategy != "ddp":
        return None
    text = yaml.safe_dump(_config(plan, deepspeed_file), sort_keys=False)
    return "".join(f"# {line}\n" for line in _notes(plan)) + text


def _config(plan: Plan, deepspeed_file: str) -> dict[str, Any]:
    layout = plan.chosen.layout
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": _kind(layout),
        **_sections(plan, deepspeed_file),
        "num_machines": plan.nodes,
        "num_processes": plan.num_ranks,
        "machine_rank": 0,
        "main_process_port": PORT if plan.nodes > 1 else 0,
        "rdzv_backend": "c10d" if plan.nodes > 1 else "static",
        "same_network": plan.nodes == 1,  # else the port is a rendezvous, as c10d wants it
        "main_training_function": "main",
        "use_cpu": plan.device == "cpu",
        "enable_cpu_affinity": False,
        "debug": False,
    }


def _kind(layout: Layout) -> str:
    if layout.engine == "deepspeed":
        return "DEEPSPEED"
    if layout.strategy in STRATEGIES:
        return "FSDP"
    return (
        "MULTI_GPU" if layout.num_ranks > 1 else "NO"
    )  # on CPU as well: its launcher is torchrun, MULTI_CPU's is mpirun


def _sections(plan: Plan, deepspeed_file: str) -> dict[str, Any]:
    """What the engine needs; for DeepSpeed the precision stands in its own file, and twice is refused."""
    layout = plan.chosen.layout
    if layout.engine == "deepspeed":
        section = {"deepspeed_config_file": deepspeed_file, "zero3_init_flag": layout.strategy in ("zero3", "hpz")}
        return {
            "deepspeed_config": {**section, **({"deepspeed_multinode_launcher": "standard"} if plan.nodes > 1 else {})}
        }
    precision = {"mixed_precision": "bf16" if layout.precision == "bf16" else "no"}
    return {**precision, **(_fsdp(plan) if layout.strategy in STRATEGIES else {})}


def _fsdp(plan: Plan) -> dict[str, Any]:
    settings, layout = fsdp_settings(plan), plan.chosen.layout
    sections: dict[str, Any] = {
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",  # the blocks that the model itself names
            "fsdp_reshard_after_forward": settings["reshard_after_forward"],
            "fsdp_offload_params": settings["cpu_offload"],
            "fsdp_activation_checkpointing": layout.recompute == "full",
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": True,
        }
    }
    if layout.strategy == "hsdp":
        sections["parallelism_config"] = {
            f"parallelism_config_dp_{axis}_size": size for axis, size in settings["mesh"].items()
        }
    return sections


def _notes(plan: Plan) -> list[str]:
    """What the script has to do itself, since accelerate's file has no key for it."""
    layout = plan.chosen.layout
    notes = [
        f"Plan {plan.digest()}: {layout.label}.",
        f"The script's part: batches of {layout.micro_batch_size} per rank,"
        f" and Accelerator(gradient_accumulation_steps={layout.accumulation_steps}).",
    ]
    if layout.recompute == "full" and layout.strategy not in STRATEGIES:
        notes.append("It calls model.gradient_checkpointing_enable().")
    if layout.precision == "pure_bf16":
        notes.append("It loads the model in bf16, and makes the optimiser after that.")
    if layout.precision == "bf16" and layout.strategy in STRATEGIES:
        notes.append("accelerate reduces gradients in bf16 here, fleetune in fp32.")
    if plan.nodes > 1:
        notes.append("On each node: accelerate launch --machine_rank N --main_process_ip ADDRESS_OF_NODE_0.")
    if plan.device == "cpu":
        notes.append("On CPU: Accelerator(cpu=True), or ACCELERATE_USE_CPU=true in the environment.")
    return notes
