"""WHAT IS LEARNED: one file per task. A task turns records into rows, rows into batches, and outputs into a loss.

Shapes here and in the tasks: B rows of a batch, T tokens of the longest row, V vocabulary, C classes.
Nothing in this file needs torch or numpy: `task_of` loads the one task that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from launcher.job.spec import JobSpec

if TYPE_CHECKING:
    from torch import Tensor

    from launcher.task.scores import Floats

IGNORED = -100
"""Target that never counts in a loss: `ignore_index` of torch's cross entropy."""

Row = dict[str, Any]
"""One sample, by the names of the task's `columns`: `input_ids`, a 1-D array or list of token ids, and what else the
task keeps. A row that was read from prepared data also has `sample`, its place in the split, and in training `epoch`."""

Batch = dict[str, "Tensor"]
"""What `MODEL_INPUTS` names goes into the model's forward; everything else is the task's: targets, weights, places."""

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")

Kind = Literal["tokens", "bytes", "ints", "class", "classes", "int", "float"]
"""What a prepared column holds: token ids; small or larger integers; a class id, or a list of them; a whole
number; a number."""


class Record(NamedTuple):
    """One record as it was read, and where: `line` counts from 1 (for parquet, the row)."""

    text: str
    """All its texts, joined by newlines: what a tokenizer learns from, and what tells records apart."""
    label: str | None = None
    file: str = ""
    line: int = 0
    parts: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never altered
    """What a text and a label cannot hold, by the names of `launcher.job.tasks.FIELDS`: messages, tags, answers."""

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label in it: one, several, one per token, or none."""
        return (self.label,) if self.label is not None else self.parts.get("labels", ())


class Facts(NamedTuple):
    """What the data says where the spec leaves it open."""

    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of their ids."""
    label_counts: tuple[int, ...] = ()
    """Training samples of each class."""
    vocab_size: int = 0
    """Token ids are below this."""
    mask_id: int | None = None
    """The token that hides another, in a masked language model."""


class TokenScores(NamedTuple):
    """What is left of logits where every target is a token: (B, T) each, 0 and False where there is no target."""

    nats: Tensor
    """Cross entropy, fp32."""
    is_right: Tensor
    """Whether the most likely token is the target."""

    def detach(self) -> TokenScores:
        """Itself: scores are made without gradients."""
        return self


class Metrics(Protocol):
    """Scores gathered batch by batch. `sums` is all of its state: add those of all ranks, then ask `result`."""

    sums: Tensor

    def update(self, logits: Any, batch: Batch) -> None:
        """logits: the head's; or of a `TokenTask` the `TokenScores` that were made of them."""

    def result(self) -> dict[str, float]: ...

    def rows(self, logits: Tensor, batch: Batch) -> Tensor:
        """(B, k) float64: a few numbers per row, from which its part in every score follows."""

    def weighted(self, rows: Floats, weights: Floats) -> dict[str, Floats]:
        """The scores of samples (N, k) taken as often as each of the `weights` (R, N) says: (R,) each."""


class Task(Protocol):
    name: str
    auto_class: str
    """Class of `transformers` that opens the model with the right head."""
    config_overrides: dict[str, Any]
    """What the head needs to be told in the model's config."""
    columns: dict[str, Kind]
    """Keys of a row and what they hold, in the order of the prepared columns; `input_ids` is the first."""
    logits_per_token: bool
    """Whether the head answers for every token, or once per sequence."""
    sequences_per_sample: int
    """Rows of `input_ids` that a batch holds for one sample: 2 where two answers are compared."""

    def logits_width(self, config: Any) -> int:
        """Numbers per answer of the head of a model with this config."""

    def rows(self, records: Iterable[Sequence[Record]], tokenizer: Any) -> Iterator[Row]:
        """Lists of records -> rows of at most `seq_len` tokens, in the order of the records."""

    def collate(self, rows: Sequence[Row], pad_id: int) -> Batch:
        """Rows -> `input_ids`, `attention_mask` (B, T) int64, padded right, and `labels`, `IGNORED` where none counts."""

    def dummy_rows(self, count: int) -> list[Row]:
        """Rows without a target, for a rank that has run out while others still compute."""

    def num_valid(self, batch: Batch) -> float:
        """Targets that count in the loss; where they are weighted, the sum of their weights."""

    def loss_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        """Sum (not mean) of the losses over the valid targets, in fp32; 0 with a gradient if there are none."""

    def metrics(self, num_samples: int = 0) -> Metrics:
        """A fresh accumulator. `num_samples`: where ranks will add their sums, the samples that they score together."""


@runtime_checkable
class TokenTask(Task, Protocol):
    """A task whose targets are tokens of the vocabulary: its loss can be made of their nats, without all logits at once."""

    every_token_counts_alike: bool
    """Whether the loss is the plain sum of the nats."""

    def token_targets(self, batch: Batch) -> Tensor:
        """(B, T): the token that each position is to predict, or `IGNORED`."""

    def loss_of_nats(self, nats: Tensor, batch: Batch) -> Tensor:
        """`loss_sum`, of the cross entropies (B, T) of `token_targets`, 0 where ignored."""


def logits_of(output: Any) -> Tensor:
    """What a head says, as one tensor: the two of a span head (start and end) side by side, (B, T, 2)."""
    import torch

    if "start_logits" in output:
        return torch.stack([output["start_logits"], output["end_logits"]], dim=-1)
    return output["logits"]


NO_FACTS = Facts()


def task_of(spec: JobSpec, facts: Facts = NO_FACTS) -> Task:
    """The task of a spec; `facts` are needed where the spec leaves something to be found in the data."""
    makers: dict[str, Callable[[JobSpec, Facts], Task]] = {
        "causal_lm": _causal_lm,
        "chat": _chat,
        "masked_lm": _masked_lm,
        "sequence_classification": _sequence_classification,
        "regression": _regression,
        "token_classification": _token_classification,
        "extractive_qa": _extractive_qa,
        "preference": _preference,
    }
    return makers[spec.task.name](spec, facts)


def _causal_lm(spec: JobSpec, facts: Facts) -> Task:
    from launcher.task.causal_lm import CausalLM

    return CausalLM(spec.training.seq_len, spec.data.packing, spec.data.stride or 0)


def _chat(spec: JobSpec, facts: Facts) -> Task:
    from launcher.task.chat import Chat

    return Chat(spec.training.seq_len)


def _masked_lm(spec: JobSpec, facts: Facts) -> Task:
    from launcher.task.masked_lm import MaskedLM

    return MaskedLM(
        spec.training.seq_len,
        spec.data.packing,
        seed=spec.seed,
        share=spec.task.mask_probability,
        whole_words=spec.task.whole_words,
        stride=spec.data.stride or 0,
        mask_id=facts.mask_id,
        vocab_size=facts.vocab_size,
    )


def _sequence_classification(spec: JobSpec, facts: Facts) -> Task:
    from launcher.task.sequence_classification import SequenceClassification, balanced_weights

    weights = spec.task.class_weights
    if weights == "balanced":
        weights = tuple(balanced_weights(facts.label_counts)) or None  # none are known before there is data
    return SequenceClassification(
        spec.training.seq_len,
        spec.task.labels or facts.labels,
        multi_label=spec.task.multi_label,
        class_weights=weights,
        label_smoothing=spec.task.label_smoothing,
    )


def _regression(spec: JobSpec, facts: Facts) -> Task:
    from launcher.task.regression import Regression

    return Regression(spec.training.seq_len)


def _token_classification(spec: JobSpec, facts: Facts) -> Task:
    from launcher.task.token_classification import TokenClassification

    labels = spec.task.labels or facts.labels
    return TokenClassification(spec.training.seq_len, labels, label_all_tokens=spec.task.label_all_tokens)


def _extractive_qa(spec: JobSpec, facts: Facts) -> Task:
    from launcher.task.extractive_qa import ExtractiveQA

    return ExtractiveQA(
        spec.training.seq_len,
        doc_stride=spec.task.doc_stride,
        max_answer_tokens=spec.task.max_answer_tokens,
        no_answer=spec.task.no_answer,
        null_threshold=spec.task.null_threshold,
    )


def _preference(spec: JobSpec, facts: Facts) -> Task:
    from launcher.task.preference import Preference

    return Preference(spec.training.seq_len, beta=spec.task.beta)
