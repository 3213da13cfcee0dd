"""Weights of linear layers as 8 or 4 bit integers with scales, one matrix at a time.

The layout is `pack-quantized` of compressed-tensors, which transformers and vLLM open: integers packed into int32 rows
by that library's own function, one scale per output (int8) or per group of inputs (int4), symmetric, rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from launcher.errors import ABSENT, CheckpointError
from launcher.stored.values import Computed, Ledger, Literal, Values, whole

BITS = {"int8": 8, "int4": 4}
GROUP_SIZES = (128, 64, 32)
"""Inputs that share a scale in int4: the first that divides them all; 128 is what every kernel has."""


def quantize(
    values: Mapping[str, Values], linears: Mapping[str, bool], how: str, head: str | None
) -> tuple[dict[str, Values], dict[str, Any]]:
    """The tensors to be written, and `quantization_config` for config.json. Raises `CheckpointError`.

    `linears` are names of matrices and whether they lie transposed; `head` is the output layer, which stays as it is.
    """
    _check_library()
    bits = BITS[how]
    if transposed := [name for name, is_transposed in linears.items() if is_transposed]:
        rule = f"has no meaning here: {transposed[0]} is a Conv1D, which no kernel reads"
        raise CheckpointError("--quantize", how, rule, "quantise a model of linear layers (Llama, Qwen, BERT, ...)")
    chosen = {name: values[name] for name in linears if name in values}
    group = None if bits == 8 else _group_size({name: one.shape[1] for name, one in chosen.items()})
    written = {name: one for name, one in values.items() if name not in chosen}
    for name, matrix in chosen.items():
        written |= _parts(name, matrix, bits, group)
    return written, _config(bits, group, head)


def _check_library() -> None:
    try:
        import compressed_tensors  # noqa: F401
    except ImportError:
        way_out = "pip install 'fleetune[quantize]'"
        raise CheckpointError("--quantize", ABSENT, "needs the library compressed-tensors", way_out) from None


def _group_size(inputs: Mapping[str, int]) -> int:
    for size in GROUP_SIZES:
        if all(count % size == 0 for count in inputs.values()):
            return size
    name = next(name for name, count in inputs.items() if count % GROUP_SIZES[-1])
    rule = f"cannot share scales: {name} has {inputs[name]} inputs, no multiple of {GROUP_SIZES[-1]}"
    raise CheckpointError("--quantize", "int4", rule, "use int8")


def _parts(name: str, matrix: Values, bits: int, group: int | None) -> dict[str, Values]:
    rows, columns = matrix.shape
    scales = (rows, columns // group if group else 1)
    stem = name.removesuffix("weight")

    def made(part: int) -> Callable[[Ledger | None], torch.Tensor]:
        return lambda ledger: _pack(whole(matrix, ledger), bits, group)[part]

    return {
        f"{stem}weight_packed": Computed((rows, -(-columns * bits // 32)), torch.int32, made(0), (matrix,)),
        f"{stem}weight_scale": Computed(scales, matrix.dtype, made(1), (matrix,)),
        f"{stem}weight_shape": Literal(torch.tensor([rows, columns])),
    }


def _pack(matrix: torch.Tensor, bits: int, group: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(int32 words, scales): the largest of a group becomes the largest integer."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    largest = 2 ** (bits - 1) - 1
    groups = matrix.float().reshape(matrix.shape[0], -1, group or matrix.shape[1])
    scales = (groups.abs().amax(dim=-1, keepdim=True) / largest).to(matrix.dtype)
    divisors = scales.float().clamp(min=torch.finfo(torch.float32).tiny)
    integers = (groups / divisors).round().clamp(-largest - 1, largest).to(torch.int8)
    return pack_to_int32(integers.reshape(matrix.shape), bits), scales.squeeze(-1)


def _config(bits: int, group: int | None, head: str | None) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": [head] if head else [],
    }
