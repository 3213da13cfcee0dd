"""Measure a spec's model on fake tensors: shapes and dtypes are real, memory and arithmetic are not.

Run as `python -m launcher.cost.measure SPEC`; prints the JSON of a `ModelCost`. Method: forward under
`torch.autograd.graph.saved_tensors_hooks` at four (micro-batch, length) points, bytes of the distinct storages that
autograd keeps, fitted by `B (a T + b T^2) + c T + d T^2`. The attention mask is taken as if rows were padded: where
none is, some models drop it and keep less. FLOPs are counted on the same runs (torch.utils.flop_counter: 2 m n k per
product; attention in full, whatever is masked). On fake CPU tensors SDPA takes the
fused kernel, which keeps its output and one number per row, as the CUDA kernels do; with attention dropout it takes
the unfused one, so there the figure is that of a CPU run and above that of a GPU.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.initialization import no_init_weights

from launcher.cost.architecture import blocks_of, head_class, in_short, model_config
from launcher.cost.values import Flops, LinearInBatch, ModelCost, SavedBytes, TensorGroup
from launcher.errors import ABSENT, ModelError, UserError
from launcher.job.load import parse_spec
from launcher.job.spec import JobSpec
from launcher.task import Facts, Task, task_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LONGEST_TRACE = 64  # tokens: little to run, enough to tell the linear from the quadratic
WIDE = 17  # samples: far from 1, so that what is particular to a batch of one weighs little in the slope


def measure(spec: JobSpec, vocab_size: int | None) -> ModelCost:
    """Cost of the spec's model. Raises `ModelError` when transformers cannot build or run it."""
    task = task_of(spec, Facts(labels=("one", "other")))  # two classes, where the spec leaves them to the data
    config = model_config(spec, vocab_size, task.config_overrides)
    if config.pad_token_id is None:
        config.pad_token_id = 0  # any will do: a decoder's classifier refuses several rows without one
    saved = {}
    for precision, dtype in DTYPES.items():
        with FakeTensorMode(), no_init_weights():
            model = _build(task, config, dtype)
            saved[precision], flops = _fit_or_refuse(model)
    return _counts(task, config, model, saved, flops)


def _build(task: Task, config: Any, dtype: torch.dtype) -> Any:
    try:
        model = head_class(task.auto_class).from_config(config, dtype=dtype, trust_remote_code=False).train()
    except (ValueError, ImportError, AttributeError, TypeError) as error:
        rule = f"cannot be built for {task.name} ({in_short(error)})"
        way_out = "mend the config, or choose an architecture with this head"
        raise ModelError("model", config.model_type, rule, way_out) from None
    model.tie_weights()  # part of the initialisation that is left out here
    return model


def _fit_or_refuse(model: Any) -> tuple[SavedBytes, Flops]:
    """Some modules cannot run without data (routing by value, kernels of one dtype): say so rather than guess."""
    try:
        return _fit(model)
    except (RuntimeError, NotImplementedError) as error:
        rule = f"cannot be traced without data ({in_short(error)})"
        raise ModelError(
            "model", type(model).__name__, rule, "choose another architecture: this one cannot be planned yet"
        ) from None


def _counts(task: Task, config: Any, model: Any, saved: dict[str, SavedBytes], flops: Flops) -> ModelCost:
    blocks = blocks_of(model)
    block_sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    num_params = sum(p.numel() for p in model.parameters())
    return ModelCost(
        architecture=type(model).__name__,
        num_params=num_params,
        num_trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_blocks=len(blocks),
        block_num_params=max(block_sizes, default=0),
        outside_num_params=num_params - sum(block_sizes),
        logits_width=task.logits_width(config),
        logits_per_token=task.logits_per_token,
        max_positions=_max_positions(config),
        saved=saved,
        flops=flops,
        tensors=_tensors(model, blocks),
    )


def _tensors(model: Any, blocks: list[Any]) -> tuple[TensorGroup, ...]:
    in_blocks = {parameter for block in blocks for parameter in block.parameters()}
    kinds = Counter((tuple(p.shape), p.requires_grad, p in in_blocks) for p in model.parameters())
    return tuple(TensorGroup(shape, count, trainable, inside) for (shape, trainable, inside), count in kinds.items())


def _max_positions(config: Any) -> int | None:
    """RoBERTa's family starts its positions after the padding id, so two of its rows are never reached."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in ("roberta", "xlm-roberta", "camembert"):
        return int(positions) - config.pad_token_id - 1
    return positions


def _fit(model: Any) -> tuple[SavedBytes, Flops]:
    """Exact in the length; exact in the batch at 1 and at WIDE, and above the truth by at most a few per cent between.

    Not a straight line: a batch of one keeps views, of the fused query, key and value say, where others keep copies.
    """
    length_long = min(LONGEST_TRACE, _max_positions(model.config) or LONGEST_TRACE)
    lengths = sorted({max(1, length_long // 2), length_long})
    one, many = ({length: _trace(model, batch, length) for length in lengths} for batch in (1, WIDE))
    fits = {}
    for part in ("blocks", "outside", "block_inputs"):
        per_sample = {length: (many[length][part] - one[length][part]) / (WIDE - 1) for length in lengths}
        fixed = {length: one[length][part] - per_sample[length] for length in lengths}
        fits[part] = LinearInBatch(*_through_origin(per_sample), *_through_origin(fixed))
    return SavedBytes(**fits), _flops(many)


def _flops(many: dict[int, dict[str, int]]) -> Flops:
    """What grows with the square of the length is attention; a pooler, once per sample, counts at the longest trace."""
    fits = {}
    for part in ("block_flops", "outside_flops"):
        per_sample = {length: counted[part] / WIDE for length, counted in many.items()}
        per_token, squared = _through_origin(per_sample)
        fits[part] = (per_token, squared) if squared > 0 else (per_sample[max(many)] / max(many), 0.0)
    (blocks, in_blocks), (outside, elsewhere) = fits["block_flops"], fits["outside_flops"]
    return Flops(blocks, outside, in_blocks + elsewhere)


def _through_origin(values: dict[int, float]) -> tuple[float, float]:
    """(a, b) such that `a T + b T^2` is the value at each of the one or two lengths T."""
    rates = {length: value / length for length, value in values.items()}
    if len(rates) == 1:
        return rates.popitem()[1], 0.0
    (short, low), (long, high) = rates.items()
    squared = (high - low) / (long - short)
    return low - squared * short, squared


def _trace(model: Any, micro_batch_size: int, seq_len: int) -> dict[str, int]:
    """Bytes kept for backward by one forward pass, and its FLOPs, by part."""
    recorder = _Recorder(model)
    ids = torch.zeros(micro_batch_size, seq_len, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if hasattr(model.config, "use_cache"):
        inputs["use_cache"] = False
    with (
        recorder.attached(),
        torch.autograd.graph.saved_tensors_hooks(recorder.pack, lambda tensor: tensor),
        recorder.counter,
    ):
        model(**inputs)
    in_blocks = recorder.block_flops
    return {
        **recorder.num_bytes,
        "block_flops": in_blocks,
        "outside_flops": recorder.counter.get_total_flops() - in_blocks,
    }


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """From the shapes of batch, heads, length and width of a head. The counter knows every fused kernel but the CPU's."""
    batch, heads, length, width = query
    return int(2 * batch * heads * length * key[-2] * (width + value[-1]))


class _Recorder:
    """Counts each storage once, for the part of the model that was running when it was first kept."""

    def __init__(self, model: Any) -> None:
        self.blocks = blocks_of(model)
        self.seen = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self.alive: list[torch.Tensor] = []  # a freed fake storage's address could be given out again
        self.part = "outside"
        self.num_bytes = {"blocks": 0, "outside": 0, "block_inputs": 0}
        self.counter = FlopCounterMode(
            display=False,
            custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops},
        )
        self.block_flops = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.alive.append(tensor)
            self.num_bytes[self.part] += storage.nbytes()
        return tensor

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.num_bytes["block_inputs"] += hidden.nbytes
        self.part = "blocks"
        self.block_flops -= self.counter.get_total_flops()

    def _leave(self, *_: Any) -> None:
        self.part = "outside"
        self.block_flops += self.counter.get_total_flops()

    @contextmanager
    def attached(self) -> Iterator[None]:
        hooks = [block.register_forward_pre_hook(self._enter, with_kwargs=True) for block in self.blocks]
        hooks += [block.register_forward_hook(self._leave) for block in self.blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _vocab_size(spec: JobSpec, trained: int | None) -> int | None:
    """Rows of the embedding of random weights: the trained tokenizer's pieces, else those of the tokenizer named."""
    if trained is not None or spec.data.tokenizer is None or spec.model.path is not None:
        return trained
    from launcher.data.tokenizer import load_tokenizer, num_ids, tokenizer_source

    return num_ids(load_tokenizer(tokenizer_source(spec)))


def main() -> None:
    """Body of the measuring process: spec and vocabulary size come as JSON on standard input, the cost goes out."""
    request = json.load(sys.stdin)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    spec = parse_spec(request["spec"])
    try:
        answer = measure(spec, _vocab_size(spec, request["vocab_size"])).to_json()
    except UserError as error:
        # a problem without a value is sent without that key: the sign for it does not survive JSON
        answer = {"problem": {key: value for key, value in error.problems[0]._asdict().items() if value is not ABSENT}}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
