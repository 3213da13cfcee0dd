"""Measure a spec's model without memory: counted and traced on the meta device, where tensors are shapes alone.

Run as `python -m launcher.cost.measure`; prints the JSON of a `ModelCost`. Method: the real modules with few of their
blocks (`reduced.py`) run forward, loss and backward there, watched by `live.py`, at nine (micro-batch, length)
points for every precision and recompute policy; the bytes are fitted exactly (`fit.py`). Attention is fused, as on a GPU;
where this differs from what a CPU does, and for eager attention, there are traces of their own. Rows are taken as padded,
unless the task packs them full: then the mask is left out, as transformers does. FLOPs are torch.utils.flop_counter's:
2 m n k per product; attention in full, whatever is masked.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, masking_utils
from transformers.initialization import no_init_weights

from launcher.cost.architecture import blocks_of, enable_recompute, head_class, in_short, model_config
from launcher.cost.fit import Point, envelope, fitted, lengths_up_to, parabola, points
from launcher.cost.kernels import as_on_gpus, replaced
from launcher.cost.reduced import Reduced, in_precision, reduced, whole
from launcher.cost.trace import BLOCKS, EMBEDDINGS, LOSS, Trace, watched
from launcher.cost.trainable import apply_method
from launcher.cost.values import Flops, LinearInBatch, ModelCost, PeakBytes, SavedBytes, TensorGroup
from launcher.errors import ABSENT, ModelError, UserError
from launcher.job.load import parse_spec
from launcher.job.spec import JobSpec
from launcher.task import Facts, Task, task_of


class Setting(NamedTuple):
    """What a trace is made under."""

    dtype: torch.dtype
    autocast: bool = False
    fused: bool = True
    attention: str | None = None
    """`eager`; None: what transformers chooses."""
    recompute: bool = True
    """Whether full recompute is traced as well."""


SETTINGS = {
    "fp32": Setting(torch.float32),
    "bf16": Setting(torch.bfloat16),
    "autocast": Setting(torch.float32, autocast=True),
    "fp32/cpu": Setting(torch.float32, fused=False),
}
EAGER = {
    "fp32/eager": Setting(torch.float32, attention="eager"),
    "bf16/eager": Setting(torch.bfloat16, attention="eager"),
}
"""Not asked for by any plan: engines train with what transformers chooses."""


def measure(spec: JobSpec, vocab_size: int | None, settings: dict[str, Setting] = SETTINGS) -> ModelCost:
    """Cost of the spec's model. Raises `ModelError` when transformers cannot build or run it."""
    task = task_of(spec, Facts(labels=("one", "other")))  # two classes, where the spec leaves them to the data
    config = model_config(spec, vocab_size, task.config_overrides)
    if config.pad_token_id is None:
        config.pad_token_id = 0  # any will do: a decoder's classifier refuses several rows without one
    model = apply_method(_build(task, config), spec.method)
    bench = Bench(task, reduced(model), _mask(spec), _max_positions(config))
    traced = {name: _fit_or_refuse(bench, model, setting) for name, setting in _wanted(settings, config).items()}
    return _counts(task, config, model, bench, traced)


def _build(task: Task, config: Any) -> Any:
    try:
        with torch.device("meta"), no_init_weights():
            model = head_class(task.auto_class).from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, ImportError, AttributeError, TypeError) as error:
        rule = f"cannot be built for {task.name} ({in_short(error)})"
        way_out = "mend the config, or choose an architecture with this head"
        raise ModelError("model", config.model_type, rule, way_out) from None
    model.tie_weights()  # part of the initialisation that is left out here
    return model.train()


def _wanted(settings: dict[str, Setting], config: Any) -> dict[str, Setting]:
    """Where attention has no dropout, the CPU's kernel is fused like a GPU's: no trace of its own."""
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")
    drops = any(getattr(config, name, 0) for name in names)
    return {name: setting for name, setting in settings.items() if setting.fused or drops}


def _mask(spec: JobSpec) -> str:
    """What attention is told of the rows: `none` where they are full, `padding`, or `documents` that they hold."""
    if spec.task.name != "causal_lm":
        return "padding"
    return {"concat": "none", "none": "padding"}.get(spec.data.packing, "documents")


class Runs(NamedTuple):
    """Traces by point, of one setting."""

    plain: dict[Point, Trace]
    recomputed: dict[Point, Trace]
    """Empty where the architecture cannot recompute."""


class Bench:
    """A model with few blocks, run under any setting at any point."""

    def __init__(self, task: Task, few: Reduced, mask: str, max_positions: int | None) -> None:
        self.task, self.few, self.mask = task, few, mask
        self.lengths = lengths_up_to(max_positions or 10**9)
        self.derived: set[str] = set()

    def runs(self, setting: Setting) -> Runs:
        model = in_precision(self.few.model, setting.dtype)
        if setting.attention:
            model.set_attn_implementation(setting.attention)
        plain = {point: self._run(model, setting, point) for point in points(self.lengths)}
        again = {}
        if setting.recompute and model.supports_gradient_checkpointing:
            enable_recompute(model)
            again = {point: self._run(model, setting, point) for point in points(self.lengths)}
        return Runs(plain, again)

    def _run(self, model: Any, setting: Setting, point: Point) -> Trace:
        batch = {name: tensor.to("meta") for name, tensor in _batch(self.task, *point).items()}
        if self.mask != "padding":
            del batch["attention_mask"]

        def more_inputs() -> dict[str, Any]:
            more: dict[str, Any] = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
            if self.mask == "documents":
                rows, length = batch["input_ids"].shape
                more |= _document_masks(model.config, rows, length, setting)
            return more

        @contextmanager
        def kernels(count: Callable[[int], None]) -> Iterator[None]:
            with as_on_gpus(setting.fused, setting.autocast, count) as derived:
                yield
            self.derived |= derived

        with torch.device("meta"), _without_values(self.mask):
            return whole(watched(model, self.task, batch, more_inputs, kernels), self.few.stands_for)


@contextmanager
def _without_values(mask: str) -> Iterator[None]:
    """transformers looks into the rows: packed or padded? padding without a mask? Nothing is there to be looked at."""
    name, answer = ("find_packed_sequence_indices", None) if mask == "none" else ("is_tracing", True)
    with ExitStack() as stack:
        stack.enter_context(replaced(masking_utils, name, lambda *_, **__: answer))
        stack.enter_context(replaced(PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda *_, **__: None))
        yield


def _batch(task: Task, micro_batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
    """Rows of this length, through the task's own hands."""
    stretched = {name for name, kind in task.columns.items() if kind in ("tokens", "bytes", "ints")}
    rows = [
        {name: [0] * seq_len if name in stretched else value for name, value in row.items()}
        for row in task.dummy_rows(micro_batch_size)
    ]
    return task.collate(rows, 0)


def _document_masks(config: Any, rows: int, length: int, setting: Setting) -> dict[str, Any]:
    """One additive mask for each kind of attention, as packed rows get it."""
    kinds = sorted(set(getattr(config, "layer_types", None) or ("full_attention",)))
    dtype = torch.bfloat16 if setting.autocast else setting.dtype
    masks = {kind: torch.zeros(rows, 1, length, length, dtype=dtype) for kind in kinds}
    return {"attention_mask": masks if len(masks) > 1 else masks[kinds[0]]}


def _fit_or_refuse(bench: Bench, model: Any, setting: Setting) -> tuple[SavedBytes, dict[str, PeakBytes], Flops]:
    """Some modules cannot run without data (routing by value): say so rather than guess."""
    try:
        runs = bench.runs(setting)
    except (RuntimeError, NotImplementedError) as error:
        rule = f"cannot be traced without data ({in_short(error)})"
        raise ModelError(
            "model", type(model).__name__, rule, "choose another architecture: this one cannot be planned yet"
        ) from None
    peaks = {"none": _peak(runs.plain)}
    if runs.recomputed:
        peaks["full"] = _peak(runs.recomputed)
    return _saved(runs), peaks, _flops(runs.plain)


def _saved(runs: Runs) -> SavedBytes:
    def of(value: Callable[[Trace], int]) -> LinearInBatch:
        return fitted({point: value(trace) for point, trace in runs.plain.items()})

    kept = {
        point: _in_blocks(trace) - (trace.after_forward - runs.recomputed[point].after_forward)
        for point, trace in runs.plain.items()
        if runs.recomputed
    }
    return SavedBytes(
        blocks=of(_in_blocks),
        outside=of(lambda trace: trace.saved[-1]),
        block_inputs=of(lambda trace: sum(trace.inputs)),
        recomputed=fitted(kept) if kept else None,
    )


def _in_blocks(trace: Trace) -> int:
    return sum(size for number, size in trace.saved.items() if number >= 0)


def _peak(traces: dict[Point, Trace]) -> PeakBytes:
    def of(moment: str) -> tuple[LinearInBatch, ...]:
        return envelope(
            {point: [alive for when, alive in trace.course if when == moment] for point, trace in traces.items()}
        )

    return PeakBytes(loss=of(LOSS), blocks=of(BLOCKS), embeddings=of(EMBEDDINGS))


def _flops(traces: dict[Point, Trace]) -> Flops:
    """Per token. What grows with the square of the length is attention; a head of one answer counts at the longest."""
    batch, longest = max(traces)
    fits = {}
    for way in ("forward", "backward"):
        for inside in (True, False):
            values = {
                length: sum(count for part, count in trace.flops.items() if _counts_for(trace, part, way, inside))
                / batch
                for (rows, length), trace in traces.items()
                if rows == batch
            }
            constant, linear, squared = parabola(values)
            fits[way, inside] = (linear + constant / longest, squared)
    return Flops(
        blocks=fits["forward", True][0],
        outside=fits["forward", False][0],
        attention=fits["forward", True][1] + fits["forward", False][1],
        blocks_backward=fits["backward", True][0],
        outside_backward=fits["backward", False][0],
        attention_backward=fits["backward", True][1] + fits["backward", False][1],
    )


def _counts_for(trace: Trace, part: tuple[str, int], way: str, inside: bool) -> bool:
    return part[0] == way and (0 <= part[1] < len(trace.inputs)) == inside


Traced = tuple[SavedBytes, dict[str, PeakBytes], Flops]


def _counts(task: Task, config: Any, model: Any, bench: Bench, traced: dict[str, Traced]) -> ModelCost:
    blocks = blocks_of(model)
    block_sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    num_params = sum(p.numel() for p in model.parameters())
    return ModelCost(
        architecture=type(getattr(model, "get_base_model", lambda: model)()).__name__,
        num_params=num_params,
        num_trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_active_params=_active(model, config),
        num_blocks=len(blocks),
        num_block_passes=_passes(config, len(blocks)),
        block_num_params=max(block_sizes, default=0),
        outside_num_params=num_params - sum(block_sizes),
        logits_width=task.logits_width(config),
        logits_per_token=task.logits_per_token,
        max_positions=_max_positions(config),
        saved={name: saved for name, (saved, _, _) in traced.items()},
        peak={name: peaks for name, (_, peaks, _) in traced.items()},
        flops=traced["fp32"][2],
        derived=tuple(sorted(bench.derived)),
        tensors=_tensors(model, blocks),
    )


def _passes(config: Any, num_blocks: int) -> int | None:
    """Blocks that share their weights are passed through again and again."""
    return config.num_hidden_layers if config.num_hidden_layers != num_blocks else None


def _active(model: Any, config: Any) -> int:
    """All but the experts that a token does not meet: of E alike, stacked in one tensor, it meets `num_experts_per_tok`."""
    total = sum(p.numel() for p in model.parameters())
    met = getattr(config, "num_experts_per_tok", None)
    for module in model.modules():
        experts = getattr(module, "num_experts", None)
        if met and experts and hasattr(module, "down_proj"):
            stacked = sum(p.numel() for p in module.parameters(recurse=True) if p.dim() == 3 and p.shape[0] == experts)
            total -= stacked * (experts - met) // experts
    return total


def _tensors(model: Any, blocks: list[Any]) -> tuple[TensorGroup, ...]:
    in_blocks = {parameter for block in blocks for parameter in block.parameters()}
    kinds = Counter((tuple(p.shape), p.requires_grad, p in in_blocks) for p in model.parameters())
    return tuple(TensorGroup(shape, count, trainable, inside) for (shape, trainable, inside), count in kinds.items())


def _max_positions(config: Any) -> int | None:
    """RoBERTa's family starts its positions after the padding id, so two of its rows are never reached."""
    positions = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))
    if positions is not None and config.model_type in ("roberta", "xlm-roberta", "camembert"):
        return int(positions) - config.pad_token_id - 1
    return positions


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
