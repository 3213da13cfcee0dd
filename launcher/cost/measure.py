"""Measure a spec's model on fake tensors: shapes and dtypes are real, memory and arithmetic are not.

Run as `python -m launcher.cost.measure SPEC`; prints the JSON of a `ModelCost`. Method: forward under
`torch.autograd.graph.saved_tensors_hooks` at three (micro-batch, length) points, bytes of the distinct storages that
autograd keeps, fitted by `B * (a T + b T^2)`, which is exact for transformers. On fake CPU tensors SDPA takes the
fused kernel, which keeps its output and one number per row, as the CUDA kernels do; with attention dropout it takes
the unfused one, so there the figure is that of a CPU run and above that of a GPU.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from launcher.cost.architecture import blocks_of, head_class, in_short, model_config
from launcher.cost.values import LinearInBatch, ModelCost, SavedBytes
from launcher.errors import ABSENT, ModelError, UserError
from launcher.job.load import parse_spec
from launcher.job.spec import JobSpec
from launcher.task import Task, task_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LONGEST_TRACE = 64  # tokens: little to run, enough to tell the linear from the quadratic


def measure(spec: JobSpec, vocab_size: int | None) -> ModelCost:
    """Cost of the spec's model. Raises `ModelError` when transformers cannot build or run it."""
    task = task_of(spec, labels=("one", "other"))  # two classes, where the spec leaves them to the data
    config = model_config(spec, vocab_size, task.config_overrides)
    saved = {}
    for precision, dtype in DTYPES.items():
        with FakeTensorMode(), no_init_weights():
            model = _build(task, config, dtype)
            saved[precision] = _fit_or_refuse(model)
    return _counts(spec, config, model, saved)


def _build(task: Task, config: Any, dtype: torch.dtype) -> Any:
    try:
        return head_class(task.auto_class).from_config(config, dtype=dtype, trust_remote_code=False).train()
    except (ValueError, ImportError, AttributeError, TypeError) as error:
        rule = f"cannot be built for {task.name} ({in_short(error)})"
        way_out = "mend the config, or choose an architecture with this head"
        raise ModelError("model", config.model_type, rule, way_out) from None


def _fit_or_refuse(model: Any) -> SavedBytes:
    """Some modules cannot run without data (routing by value, kernels of one dtype): say so rather than guess."""
    try:
        return _fit(model)
    except (RuntimeError, NotImplementedError) as error:
        rule = f"cannot be traced without data ({in_short(error)})"
        raise ModelError(
            "model", type(model).__name__, rule, "choose another architecture: this one cannot be planned yet"
        ) from None


def _counts(spec: JobSpec, config: Any, model: Any, saved: dict[str, SavedBytes]) -> ModelCost:
    blocks = blocks_of(model)
    block_sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    num_params = sum(p.numel() for p in model.parameters())
    per_token = spec.task.name == "causal_lm"
    return ModelCost(
        architecture=type(model).__name__,
        num_params=num_params,
        num_trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_blocks=len(blocks),
        block_num_params=max(block_sizes, default=0),
        outside_num_params=num_params - sum(block_sizes),
        logits_width=config.vocab_size if per_token else config.num_labels,
        logits_per_token=per_token,
        max_positions=_max_positions(config),
        saved=saved,
    )


def _max_positions(config: Any) -> int | None:
    """RoBERTa's family starts its positions after the padding id, so two of its rows are never reached."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in ("roberta", "xlm-roberta", "camembert"):
        return int(positions) - config.pad_token_id - 1
    return positions


def _fit(model: Any) -> SavedBytes:
    length_long = min(LONGEST_TRACE, _max_positions(model.config) or LONGEST_TRACE)
    length_short = max(1, length_long // 2)
    short, long, wide = (_trace(model, *point) for point in ((1, length_short), (1, length_long), (2, length_long)))
    fits = {}
    for part in ("blocks", "outside", "block_inputs"):
        doubled = wide[part] - long[part]  # what one more row of the batch adds: free of constants such as masks
        rise = doubled / length_long - short[part] / length_short
        squared = max(0.0, rise / max(1, length_long - length_short))
        fits[part] = LinearInBatch(doubled / length_long - squared * length_long, squared)
    return SavedBytes(**fits)


def _trace(model: Any, micro_batch_size: int, seq_len: int) -> dict[str, int]:
    """Bytes kept for backward by one forward pass, by part."""
    recorder = _Recorder(model)
    ids = torch.zeros(micro_batch_size, seq_len, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if hasattr(model.config, "use_cache"):
        inputs["use_cache"] = False
    with recorder.attached(), torch.autograd.graph.saved_tensors_hooks(recorder.pack, lambda tensor: tensor):
        model(**inputs)
    return recorder.num_bytes


class _Recorder:
    """Counts each storage once, for the part of the model that was running when it was first kept."""

    def __init__(self, model: Any) -> None:
        self.blocks = blocks_of(model)
        self.seen = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self.alive: list[torch.Tensor] = []  # a freed fake storage's address could be given out again
        self.part = "outside"
        self.num_bytes = {"blocks": 0, "outside": 0, "block_inputs": 0}

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

    def _leave(self, *_: Any) -> None:
        self.part = "outside"

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
