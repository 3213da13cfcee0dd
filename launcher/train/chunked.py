"""The loss over a vocabulary, some tokens at a time: the logits of a whole batch never exist.

The model runs as it is, but for its head: in place of logits that one gives the losses themselves, so whatever an engine
does around a forward pass (gathering a sharded head, reducing gradients, adapters beside it) holds as ever. Positions
without a target are left out. What a family does to its logits behind the head (`Bend`) happens inside; that all of
the model does is looked at before the first step (`StepLoss.settle`).

Shapes: N tokens with a target, H hidden width, V vocabulary, B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from launcher.errors import ModelError
from launcher.job.spec import JobSpec
from launcher.plan.values import Plan
from launcher.task import IGNORED, Batch, Task, TokenScores, TokenTask, logits_of

CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
"""Of fp32 logits at a time: on a CPU about what its caches hold, on a GPU enough rows for products at full speed."""


class Bend(NamedTuple):
    """What a model does to its logits: a scale (Cohere, Granite), then a soft cap (Gemma 2 and 3)."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Bend:
        config = model.config.get_text_config()
        scale = float(getattr(model, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        scaled = logits * self.scale if self.scale != 1.0 else logits
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap

    def back(self, gradient: Tensor, bent: Tensor) -> Tensor:
        """Through the bend, in place."""
        if self.cap is not None:
            gradient.mul_(1 - (bent / self.cap) ** 2)
        return gradient.mul_(self.scale) if self.scale != 1.0 else gradient


@contextmanager
def unbent(model: Any) -> Iterator[None]:
    """The model leaves alone what comes out of its head."""
    config = model.config.get_text_config()
    neutral = ((model, "logit_scale", 1.0), (config, "logits_scaling", 1.0), (config, "final_logit_softcapping", None))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in neutral if hasattr(owner, name)]
    try:
        for owner, name, value in neutral:
            if hasattr(owner, name):
                setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


class SumOfNats(torch.autograd.Function):
    """Sum of the cross entropies in nats of N targets under a linear head.

    Gradients are made in the forward pass, while a chunk's logits are there: each costs its three products, as usual.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, bend: Bend, rows: int
    ) -> Tensor:
        """hidden (N, H), weight (V, H), bias (V,), targets (N,) -> fp32 scalar. rows: tokens at a time."""
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        dtype = torch.get_autocast_dtype(hidden.device.type) if _is_autocast(hidden) else weight.dtype
        used, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and for_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(targets), rows):
            chunk, wanted = hidden[start : start + rows].to(dtype), targets[start : start + rows, None]
            bent = bend(functional.linear(chunk, used, offset).float())
            log_sum = bent.logsumexp(1, keepdim=True)
            total += (log_sum - bent.gather(1, wanted)).sum()
            if not any((for_hidden, for_weight, for_bias)):
                continue
            shares = torch.exp(bent - log_sum) if bend.cap else bent.sub_(log_sum).exp_()
            gradient = bend.back(shares.scatter_add_(1, wanted, shares.new_full((), -1.0).expand_as(wanted)), bent)
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
            gradient = gradient.to(dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = gradient @ used
            if grad_weight is not None and dtype == torch.float32:
                grad_weight.addmm_(gradient.T, chunk)
            elif grad_weight is not None:
                grad_weight += gradient.T @ chunk
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (scale,) = outputs
        grads, ctx.grads = ctx.grads, None  # scaled where they lie: a head's gradient is as large as the head
        scaled = [None if g is None else g.mul_(scale).to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
        return (*scaled, None, None, None)


class StepLoss:
    """The loss of a batch as the spec has it made: of all its logits, or in chunks."""

    def __init__(self, plan: Plan, spec: JobSpec, model: Any, task: Task) -> None:
        self._task = task
        self._asked = spec.training.loss
        self.chunked: ChunkedLoss | None = None
        if isinstance(task, TokenTask) and self._asked != "full":
            self.chunked = ChunkedLoss(model, task, is_scaled=plan.chosen.layout.precision == "fp16")

    def of(self, call: Callable[[], Any], batch: Batch) -> Tensor:
        """Sum of the losses; `call` runs the model on the batch."""
        if self.chunked is None:
            return self._task.loss_sum(logits_of(call()), batch)
        return self.chunked.loss_sum(call, batch)

    def scores(self, call: Callable[[], Any], batch: Batch) -> Tensor | TokenScores:
        """What metrics are made of."""
        return logits_of(call()) if self.chunked is None else self.chunked.scores(call, batch)

    def settle(self, evaluate: Callable[[Batch], Tensor], device: torch.device) -> str | None:
        """Look, all ranks alike, whether the chunks do to logits what the model does; `evaluate` is the engine's.

        Where they do not, logits are made whole, and what is returned says so; raises `ModelError` where the spec asks
        for chunks.
        """
        if self.chunked is None or self.chunked.is_the_models(evaluate, device):
            return None
        rule = "does not know what this model does between its hidden states and its logits"
        if self._asked == "chunked":
            raise ModelError("training.loss", "chunked", rule, "set it to auto or full")
        self.chunked = None
        return f"training.loss: all logits at once, since the loss in chunks {rule}"


def _is_autocast(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


class ChunkedLoss:
    """The step's loss of a task that predicts tokens."""

    def __init__(self, model: Any, task: TokenTask, is_scaled: bool = False) -> None:
        """is_scaled: backward begins with a scaled loss (fp16), in which gradients must be made to be representable."""
        self._model = getattr(model, "get_base_model", lambda: model)()
        self._task = task
        self._head = self._model.get_output_embeddings()
        self._bend = Bend.of(self._model)
        is_plain = type(self._head) is nn.Linear and "forward" not in vars(self._head)
        self._sums_at_once = is_plain and task.every_token_counts_alike and not is_scaled

    def loss_sum(self, call: Callable[[], Any], batch: Batch) -> Tensor:
        """What `task.loss_sum` says of the logits; `call` runs the model on the batch."""
        wanted = _Wanted(self._task.token_targets(batch))
        if self._sums_at_once:
            with self._head_gives(lambda hidden: self._sum(hidden, wanted)), unbent(self._model):
                return logits_of(call()).sum()
        with self._head_gives(lambda hidden: wanted.spread(self._nats(hidden, wanted))[..., None]), unbent(self._model):
            return self._task.loss_of_nats(logits_of(call())[..., 0].float(), batch)

    def scores(self, call: Callable[[], Any], batch: Batch) -> TokenScores:
        """Of a batch that is not learnt from."""
        wanted = _Wanted(self._task.token_targets(batch))
        with self._head_gives(lambda hidden: wanted.spread(self._both(hidden, wanted))), unbent(self._model):
            both = logits_of(call())
        return TokenScores(both[..., 0].float(), both[..., 1] > 0)

    def is_the_models(self, evaluate: Callable[[Batch], Tensor], device: torch.device) -> bool:
        """Whether a ramp in place of the head's output leaves the model as `Bend` says, whatever the weights are."""
        ids = torch.zeros(2, 3, dtype=torch.int64, device=device)
        ramp = torch.linspace(-100.0, 100.0, self._width(), device=device).expand(*ids.shape, -1)
        seen: list[Tensor] = []

        def give(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return ramp.to(hidden.dtype)

        with self._head_gives(give):
            found = evaluate({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        if [hidden.shape[:-1] for hidden in seen] != [ids.shape] or found.shape != ramp.shape:
            return False
        expected = self._bend(ramp.to(seen[0].dtype).float())
        rounding = 8 * max(torch.finfo(dtype).eps for dtype in (seen[0].dtype, found.dtype))
        return torch.allclose(found.float(), expected, rtol=rounding, atol=rounding)

    @contextmanager
    def _head_gives(self, answer: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """For one forward pass. The module itself is still called, with the hooks that engines have on it."""
        self._forward = self._head.forward
        had_own = vars(self._head).get("forward")
        self._head.forward = answer
        try:
            yield
        finally:
            if had_own is None:
                del self._head.forward
            else:
                self._head.forward = had_own

    def _width(self) -> int:
        return int(getattr(self._head, "out_features", None) or self._model.config.get_text_config().vocab_size)

    def _rows(self, device: torch.device) -> int:
        return max(16, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * self._width()))

    def _sum(self, hidden: Tensor, wanted: _Wanted) -> Tensor:
        head, rows = self._head, self._rows(hidden.device)
        total: Any = SumOfNats.apply(wanted.of(hidden), head.weight, head.bias, wanted.targets, self._bend, rows)
        return total.reshape(1, 1, 1)

    def _nats(self, hidden: Tensor, wanted: _Wanted) -> Tensor:
        """(N,) fp32; the logits are made again for backward."""
        rows = self._rows(hidden.device)
        chunks = zip(wanted.of(hidden).split(rows), wanted.targets.split(rows), strict=True)
        return torch.cat([checkpoint(self._nats_of, *chunk, use_reentrant=False) for chunk in chunks])

    def _nats_of(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self._bend(self._forward(hidden).float()), targets, reduction="none")

    def _both(self, hidden: Tensor, wanted: _Wanted) -> Tensor:
        """(N, 2): nats, and 1 where the most likely token is the right one."""
        rows, found = self._rows(hidden.device), []
        for chunk, targets in zip(wanted.of(hidden).split(rows), wanted.targets.split(rows), strict=True):
            bent = self._bend(self._forward(chunk).float())
            nats = functional.cross_entropy(bent, targets, reduction="none")
            found.append(torch.stack([nats, (bent.argmax(1) == targets).float()], dim=1))
        return torch.cat(found)


class _Wanted:
    """The positions of a batch that have a target. One at least, so that every rank's graph reaches the head."""

    def __init__(self, targets: Tensor) -> None:
        self._shape = targets.shape
        flat = targets.reshape(-1)
        self._places = (flat != IGNORED).nonzero()[:, 0]
        self._is_all = len(self._places) == len(flat)
        self.targets = flat if self._is_all else flat[self._places]

    def of(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat if self._is_all else flat[self._places]

    def spread(self, values: Tensor) -> Tensor:
        """(N, ...) -> (B, T, ...), 0 where there is no target."""
        if not self._is_all:
            empty = values.new_zeros((self._shape.numel(), *values.shape[1:]))
            values = empty.index_copy(0, self._places, values)
        return values.reshape(*self._shape, *values.shape[1:])
