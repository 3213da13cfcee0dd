"""WHAT OTHERS READ: Plan -> DeepSpeed JSON, FSDP settings, argv, sbatch text. Pure: nothing is written or started here."""

from launcher.emit.accelerate import accelerate_config
from launcher.emit.argv import Launch, Via, launch_command
from launcher.emit.deepspeed_json import deepspeed_config, load_preset
from launcher.emit.fsdp import fsdp_settings
from launcher.emit.runnable import check_runnable
from launcher.emit.slurm import BatchJob, render_sbatch

__all__ = [
    "BatchJob",
    "Launch",
    "Via",
    "accelerate_config",
    "check_runnable",
    "deepspeed_config",
    "fsdp_settings",
    "launch_command",
    "load_preset",
    "render_sbatch",
]
