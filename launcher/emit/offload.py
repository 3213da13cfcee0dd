"""DeepSpeed's sections for state that lies in host memory or on NVMe, with every size that the plan counts."""

from __future__ import annotations

from typing import Any

from launcher.errors import ABSENT, SpecError
from launcher.job.spec import JobSpec
from launcher.plan.layout import Layout
from launcher.plan.memory.host import OPTIMIZER_BUFFERS, PARAM_BUFFER_ELEMENTS, PARAM_BUFFERS


def offload_sections(layout: Layout, spec: JobSpec, pinned: bool) -> dict[str, Any]:
    """`offload_optimizer` and `offload_param` of `zero_optimization`, where the layout has them.

    pinned: page-locked host memory, which needs an accelerator. Raises `SpecError`: NVMe without a folder.
    """
    sections: dict[str, Any] = {}
    if layout.offload_optimizer != "none":
        sections["offload_optimizer"] = {
            "device": layout.offload_optimizer,
            "pin_memory": pinned,
            **_nvme(layout.offload_optimizer, spec, buffer_count=OPTIMIZER_BUFFERS),
        }
    if layout.offload_params != "none":
        buffers = {"buffer_count": PARAM_BUFFERS, "buffer_size": PARAM_BUFFER_ELEMENTS}
        sections["offload_param"] = {
            "device": layout.offload_params,
            "pin_memory": pinned,
            **_nvme(layout.offload_params, spec, **buffers),
        }
    return sections


def _nvme(device: str, spec: JobSpec, **buffers: int) -> dict[str, Any]:
    if device != "nvme":
        return {}
    if spec.parallel.nvme_path is None:
        rule = "is missing, and the plan keeps state on NVMe"
        raise SpecError("parallel.nvme_path", ABSENT, rule, "name a folder on a local disk of every node")
    return {"nvme_path": spec.parallel.nvme_path, **buffers}
