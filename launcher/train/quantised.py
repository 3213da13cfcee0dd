"""The base of QLoRA (Dettmers et al. 2023): weights in NF4 with quantised scales, by transformers and bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch

from launcher.job.spec import JobSpec


def opening(spec: JobSpec) -> dict[str, Any]:
    """What `from_pretrained` is told beside the rest; nothing but for qlora."""
    if spec.method.name != "qlora":
        return {}
    from transformers import BitsAndBytesConfig

    on_gpu = torch.cuda.is_available()
    in_bf16 = on_gpu and spec.parallel.precision != "fp32" and torch.cuda.is_bf16_supported()
    told: dict[str, Any] = {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if in_bf16 else torch.float32,
        )
    }
    return {**told, "device_map": {"": torch.cuda.current_device()}} if on_gpu else told


def settle(model: Any) -> Any:
    """The model ready for training: on a CPU bitsandbytes (0.50) would pack the weights anew for the first evaluation, in
    a way that needs widths of multiples of 64 and that training cannot read."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model
