"""What of the caller's environment goes to ranks elsewhere: a list, printed, and what of it is never shown or written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from launcher.errors import SpecError

CARRIED = (
    *("CUDA_*", "NCCL_*", "GLOO_*", "TORCH_*", "TORCHINDUCTOR_*", "TRITON_*", "PYTORCH_*", "UCX_*", "FI_*", "DS_*"),
    *("HF_*", "TRANSFORMERS_*", "TOKENIZERS_*", "WANDB_*", "MLFLOW_*", "OMP_*", "MKL_*", "PYTHON*", "FLEETUNE_*"),
    *("LD_LIBRARY_PATH", "XDG_CACHE_HOME", "http_proxy", "https_proxy", "no_proxy", "AWS_*", "GOOGLE_*"),
)
"""Names that change what ranks compute or reach; `*` ends a prefix."""
SHELL = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "LANG", "LC_*", "TZ", "TMPDIR", "PWD", "SHLVL", "HOSTNAME"),
    *("SLURM_*", "SLURMD_*", "SRUN_*", "ROCR_*", "HIP_*", "GPU_*", "ZE_*", "MODULE*", "LMOD_*", "LOADEDMODULES"),
    *("_LMFILES_", "MANPATH", "VIRTUAL_ENV", "CONDA_*", "PKG_CONFIG_PATH", "LIBRARY_PATH", "CPATH"),
)
"""Kept inside a Slurm job as well: a shell's own names, Slurm's, and those of module systems."""
_SECRET = re.compile(r"TOKEN(?!IZER)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|KEY|PRIVATE|AUTH", re.IGNORECASE)
_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?", re.ASCII)
SECRET_GLOBS = ("*TOKEN*", "*SECRET*", "*PASSW*", "*PASSPHRASE*", "*CREDENTIAL*", "*KEY*", "*PRIVATE*", "*AUTH*")
"""The same for a shell, which has no look-ahead: TOKENIZERS_PARALLELISM is hidden there without need."""


def is_secret(name: str) -> bool:
    """By its name: its value is neither shown nor written, and reaches ranks by memory and pipes alone."""
    return _SECRET.search(name) is not None


def allowed(more: Iterable[str]) -> tuple[str, ...]:
    """The list with the user's own names. Raises `SpecError` for what is no name."""
    names = tuple(more)
    for name in names:
        if not _PATTERN.fullmatch(name):
            rule = "is not the name of an environment variable"
            raise SpecError("launch.environment", name, rule, "write e.g. MY_SETTING, or MY_* for all that begin so")
    return (*CARRIED, *names)


def carried(environment: Mapping[str, str], patterns: Iterable[str]) -> dict[str, str]:
    """The variables that go along, by name."""
    told = tuple(patterns)
    return {
        name: environment[name]
        for name in sorted(environment)
        if _PATTERN.fullmatch(name) and any(fnmatchcase(name, pattern) for pattern in told)
    }


def shown(environment: Mapping[str, str]) -> str:
    """One line per variable, secrets by name alone."""
    lines = [f"{name}={'(a secret, not shown)' if is_secret(name) else environment[name]!r}" for name in environment]
    return "\n".join(lines) or "(none of them is set)"
