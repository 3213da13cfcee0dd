"""The job spec: the wish, complete and literal. `auto` is allowed only under `parallel`, where the planner decides.

The text under each field is what `fleetune schema` and the starter of `fleetune init` show: meaning, then unit.
Reading files and wording errors is `load.py`'s; this file only says what is allowed.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    Strict,
    model_serializer,
    model_validator,
)

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "hpz", "fsdp", "hsdp"]
Offload = Literal["none", "cpu", "nvme"]
Auto = Literal["auto"]
OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "lion", "muon", "sgd"]
ScheduleName = Literal[
    "cosine", "linear", "constant", "cosine_with_restarts", "polynomial", "wsd", "inverse_sqrt", "lr_range"
]
Resume = Literal["auto", "never", "weights_only"]
TaskName = Literal[
    "causal_lm",
    "chat",
    "masked_lm",
    "sequence_classification",
    "regression",
    "token_classification",
    "extractive_qa",
    "preference",
]


def _yaml_number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` (no dot) as a string: take it for the number that was meant. `true` is no number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


Int = Annotated[int, Strict()]
Bool = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(min_length=1)]
FROM_YAML = BeforeValidator(_yaml_number)  # last in an annotation, or the bounds before it are lost to the schema
Texts = Annotated[tuple[Text, ...], Field(min_length=1)]
PositiveInt = Annotated[Int, Field(ge=1, le=10**9)]  # products of two still fit 64 bits, and loops over divisors end
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), FROM_YAML]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), FROM_YAML]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), FROM_YAML]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), FROM_YAML]


Number = Annotated[Int | Annotated[float, Field(allow_inf_nan=False)], FROM_YAML]
Weights = Annotated[tuple[Positive, ...], Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ShorthandSection(Section):
    """A section whose first field may stand for the whole: `task: causal_lm`."""

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: Any) -> Any:
        return {next(iter(cls.model_fields)): value} if isinstance(value, str) else value


def _exactly_one(section: Section, first: str, second: str) -> None:
    """Of two keys that say the same thing in two ways. Raises `ValueError`: what is wrong; the way out."""
    has_first, has_second = (getattr(section, key) is not None for key in (first, second))
    if has_first and has_second:
        raise ValueError(f"has both `{first}` and `{second}`; remove one of them")
    if not (has_first or has_second):
        raise ValueError(f"has neither `{first}` nor `{second}`; give one of them")


class ModelSection(Section):
    path: Text | None = None
    """Folder or hub id of a model with weights, opened by `from_pretrained`."""
    from_config: Text | dict[str, Any] | None = None
    """Random weights instead: a `config.json`, a folder with one, or the config itself (`model_type: gpt2, n_layer: 4, ...`); `vocab_size` may be left out, the tokenizer's is taken."""

    dropout: Fraction | None = None
    """Every dropout of the model, in place of what its config says."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        _exactly_one(self, "path", "from_config")
        return self


class TaskSection(ShorthandSection):
    name: TaskName
    """What is learnt: `causal_lm` (next token), `chat` (the assistant's turns, or a completion), `masked_lm` (hidden tokens), `sequence_classification` (labels of a text or a pair), `regression` (a number for it), `token_classification` (a tag per word), `extractive_qa` (an answer's place in a text), `preference` (the better of two answers, by DPO)."""
    labels: Texts | None = None
    """Names of the classes or tags, in the order of their ids; left out, they are found in the data and sorted."""
    multi_label: Bool = False
    """sequence_classification: a text has any number of labels (a list in the label column), each a yes or no of its own."""
    class_weights: Weights | Literal["balanced"] | None = None
    """sequence_classification: weight of each class in the loss, in the order of `labels`; `balanced`: samples / (classes x samples of the class)."""
    label_smoothing: Fraction = 0.0
    """sequence_classification: share of each target that is spread over all classes."""
    mask_probability: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False), FROM_YAML] = 0.15
    """masked_lm: share of the tokens that are to be guessed; of these 80% are masked, 10% replaced, 10% left."""
    whole_words: Bool = False
    """masked_lm: draw words instead of tokens; all tokens of a word are hidden together."""
    label_all_tokens: Bool = False
    """token_classification: every token of a word counts in the loss, instead of its first (a `B-` goes on as `I-`)."""
    doc_stride: PositiveInt | None = None
    """extractive_qa: tokens that two windows of a long text share; left out, a third of `seq_len`."""
    max_answer_tokens: PositiveInt = 30
    """extractive_qa: longest answer that is given, in tokens."""
    no_answer: Bool = False
    """extractive_qa: a question may have no answer in its text, as in SQuAD 2.0."""
    null_threshold: Annotated[float, Field(allow_inf_nan=False), FROM_YAML] = 0.0
    """extractive_qa with `no_answer`: how much more than the best answer "none" must score to be given."""
    beta: Positive = 0.1
    """preference: how firmly DPO holds to the reference, the model as it is before training."""
    chat_template: Text | None = None
    """chat and preference: a Jinja file, or `plain` (`role: text` lines, each reply ended by the end-of-text token); left out, the tokenizer's own."""


class TrainTokenizer(Section):
    kind: Literal["unigram", "bpe"] = "unigram"
    """SentencePiece algorithm."""
    vocab_size: Annotated[Int, Field(ge=32, le=1_000_000)]
    """Pieces, special ones included."""


class MixtureSource(Section):
    prepared: Text
    """Folder that `fleetune prepare` made, with the same task, `seq_len` and tokenizer."""
    weight: Positive = 1.0
    """Its share of the samples, against `data.weight` and the other sources'."""
    max_epochs: Positive | None = None
    """Passes over it at most; then the others go on in their shares."""


class CleanSection(Section):
    nfc: Bool = False
    """Write every character in Unicode's composed form (NFC)."""
    strip_control: Bool = False
    """Take out control characters, but tab, newline and carriage return."""
    min_characters: PositiveInt | None = None
    """Drop shorter records."""
    max_characters: PositiveInt | None = None
    """Drop longer records."""
    keep_matching: Text | None = None
    """Drop records in which this regular expression is not found."""
    drop_matching: Text | None = None
    """Drop records in which this regular expression is found."""
    exact_duplicates: Bool = False
    """Drop all but the first of equal records."""
    near_duplicates: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), FROM_YAML] | None = None
    """Drop records whose words are as like those of an earlier one: the least Jaccard similarity of their runs of three words, estimated by MinHash; needs the package datasketch."""

    @model_validator(mode="after")
    def _patterns(self) -> CleanSection:
        for key in ("keep_matching", "drop_matching"):
            try:
                re.compile(getattr(self, key) or "")
            except re.error as error:
                raise ValueError(f"has a `{key}` that is no regular expression ({error}); mend it") from None
        return self


class AugmentSection(Section):
    copies: PositiveInt = 1
    """Altered copies of each training record; held-out records have none."""
    word_dropout: Fraction = 0.0
    """Share of the words that a copy lacks."""
    word_swap: Fraction = 0.0
    """Share of the words that change places with the next."""
    token_masking: Fraction = 0.0
    """Share of the tokens that are hidden by the tokenizer's mask token."""


class DataSection(Section):
    train: Texts | Text
    """Files, folders or globs: text, jsonl, json, csv, tsv, parquet, arrow or conll (also .gz, .zst); URLs of such (http, s3, gs); a folder of `datasets.save_to_disk`; a data set's hub id."""
    validation: Texts | Text | None = None
    """Held-out files of the same form; left out, `validation_fraction` of the training records is held out."""
    validation_fraction: Fraction = 0.05
    """Share of records held out when `validation` is not given, chosen by a hash of each record."""
    format: Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "conll"] | None = None
    """Form of the files; left out, told by their suffix."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a bad record does: `fail` stops and tells which and how many; `skip` leaves it out, counts and lists it."""
    clean: CleanSection | None = None
    """What is done to the records before anything else; `index.json` counts what each step dropped."""
    augment: AugmentSection | None = None
    """Altered copies of the training records, by `seed`, where few are labelled."""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """Text files only: what one record is (a paragraph ends at an empty line)."""
    columns: dict[Text, Text] = {}
    """Names of the columns where they are not the usual ones, what is read first: `{text: sentence, label: polarity}`."""
    header: Texts | None = None
    """csv and tsv files without a line of names: the names of their columns, in order."""
    label_separator: Text | None = None
    """multi_label: what stands between the labels of a text where they are one string, as in csv files."""
    token_dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"
    """Type of the token ids in `.bin`, `.ds` and `.mds` files, which do not say it."""
    tokenizer: Text | None = None
    """Folder or hub id of a tokenizer, or a SentencePiece `.model`; left out, the model's own."""
    train_tokenizer: TrainTokenizer | None = None
    """Train a SentencePiece tokenizer on the training records first."""
    packing: Literal["concat", "none", "best_fit"] = "concat"
    """`concat` (causal_lm): documents are joined, an end-of-text token between them, and cut into `seq_len` blocks, so attention crosses documents inside a block; `none`: one sample per document window, padded; `best_fit`: whole documents side by side in bins of `seq_len` tokens, attention inside each, and `global_batch_size` counts bins."""
    batching: Literal["in_turns", "by_length"] = "in_turns"
    """How a global batch is cut into micro-batches: in its order, or `by_length`, rows of like length together, as many as their padded tokens allow; the global batch is the same."""
    prepared: Text | None = None
    """Folder of the prepared data; left out, `<output_dir>/data`."""
    mixture: tuple[MixtureSource, ...] = ()
    """Prepared data to draw from besides this spec's own, each at its share of every stretch of the order. May be changed between two starts of a run."""
    weight: Positive = 1.0
    """Share of this spec's own data beside those of `mixture`."""
    max_epochs: Positive | None = None
    """Passes over this spec's own data at most, beside a `mixture`."""

    @model_validator(mode="after")
    def _one_tokenizer(self) -> DataSection:
        if self.tokenizer is not None and self.train_tokenizer is not None:
            raise ValueError("has both `tokenizer` (use this one) and `train_tokenizer` (make one); remove one of them")
        return self

    @model_validator(mode="after")
    def _mixture_has_sources(self) -> DataSection:
        if not self.mixture and (self.weight != 1.0 or self.max_epochs is not None):
            raise ValueError(
                "has `weight` or `max_epochs`, but no `mixture` beside which they would count; remove them"
            )
        return self


class MethodSection(ShorthandSection):
    name: Literal["full", "lora", "qlora"] = "full"
    """What is updated: `full`, every parameter that is not frozen; `lora`, low-rank adapters beside frozen weights; `qlora`, the same beside weights in 4 bits (NF4, double quantisation; bitsandbytes)."""
    freeze_embeddings: Bool = False
    """Freeze the embeddings; a head that is tied to them is frozen with them."""
    freeze_blocks: Annotated[Int, Field(ge=0)] = 0
    """Freeze this many transformer blocks, the first ones."""
    freeze: tuple[Text, ...] = ()
    """Freeze the parameters whose names match one of these patterns, such as `*.attention.*` (shell wildcards)."""
    freeze_all_but_head: Bool = False
    """Train the head alone: of a classifier all that pretraining did not make, of a language model its output layer."""
    unfreeze_every_steps: PositiveInt | None = None
    """Gradual unfreezing (ULMFiT): begin with the head alone, and after each so many steps train the next block below, the embeddings last."""
    r: PositiveInt = 16
    """lora: rank of the adapters."""
    lora_alpha: Positive = 32.0
    """lora: the adapters' output is scaled by lora_alpha / r."""
    lora_dropout: Fraction = 0.0
    """lora: dropout of the adapters' input."""
    target_modules: Texts | Text = "all-linear"
    """lora: names of the layers that get an adapter; `all-linear`, every linear layer but the head."""
    use_rslora: Bool = False
    """lora: scale by lora_alpha / sqrt(r) instead (rank-stabilised LoRA)."""
    use_dora: Bool = False
    """lora: learn magnitude and direction apart (DoRA)."""

    @model_validator(mode="after")
    def _one_way_to_freeze(self) -> MethodSection:
        others = [key for key in _FREEZING if key != "unfreeze_every_steps" and getattr(self, key)]
        if self.freeze_all_but_head and (len(others) > 1 or self.unfreeze_every_steps is not None):
            raise ValueError("has `freeze_all_but_head` and freezes more or less beside it; leave one of them out")
        return self

    @model_validator(mode="after")
    def _only_what_takes_effect(self) -> MethodSection:
        if idle := self.model_fields_set & set(_IDLE_KEYS[self.name]):
            raise ValueError(f"has `{min(idle)}`, {_IDLE_WORDS[self.name]}")
        return self

    @model_serializer(mode="wrap")
    def _without_idle_keys(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is written down can be read again, and two specs that train the same are written the same."""
        return {key: value for key, value in write(self).items() if key not in _IDLE_KEYS[self.name]}


_FREEZING = tuple(key for key in MethodSection.model_fields if key.startswith(("freeze", "unfreeze")))
ADAPTER_KEYS = tuple(key for key in MethodSection.model_fields if key not in ("name", *_FREEZING))
ADAPTERS = ("lora", "qlora")
"""Methods that train adapters."""
_IDLE_KEYS = {"full": ADAPTER_KEYS, "lora": _FREEZING, "qlora": _FREEZING}
_FROZEN_ANYWAY = "but {} freezes every weight; remove it, or choose layers by `target_modules`"
_IDLE_WORDS = {
    "full": "which is for adapters; remove it, or give `name: lora`",
    **{name: _FROZEN_ANYWAY.format(name) for name in ADAPTERS},
}


class TrainingSection(Section):
    seq_len: PositiveInt
    """Tokens per sample: longer documents are cut into windows (causal_lm) or truncated (classification)."""
    global_batch_size: PositiveInt
    """Samples per optimiser step, over all ranks and accumulation steps."""
    max_steps: PositiveInt | None = None
    """Optimiser steps; give this or `num_epochs`."""
    num_epochs: Positive | None = None
    """Passes over the training samples; give this or `max_steps`."""
    optimizer: OptimizerName = "adamw"
    """Who updates: `adamw` (torch's, fused), `adamw_8bit` (torchao: moments in 8 bits), `paged_adamw` and `paged_adamw_8bit` (bitsandbytes: moments that the driver moves to the host and back), `adafactor` (torch's), `lion` (lion-pytorch), `muon` (torch's, for the matrices of the blocks, scaled so that AdamW's rates fit; AdamW for the rest), `sgd` (torch's, with momentum)."""
    lr: Positive = 5e-5
    """Peak learning rate."""
    schedule: ScheduleName = "cosine"
    """Course of the learning rate after the warm-up, down to `min_lr_ratio` of the peak: `cosine`, `linear`, `constant`, `cosine_with_restarts`, `polynomial`, `wsd` (constant, then a decay), `inverse_sqrt`; `lr_range` rises by equal factors up to `lr`, which is what `fleetune lr-find` runs."""
    warmup_steps: Annotated[Int, Field(ge=0)] = 0
    """Optimiser steps of linear warm-up; give this, `warmup_ratio` or `warmup_tokens`."""
    warmup_ratio: Fraction = 0.0
    """Warm-up as a share of all steps."""
    warmup_tokens: Annotated[Int, Field(ge=0)] = 0
    """Warm-up in training tokens: as many steps as hold them, at the data's mean length."""
    min_lr_ratio: Share = 0.0
    """Learning rate at the end, as a share of the peak."""
    lr_cycles: PositiveInt = 1
    """cosine_with_restarts: times that the rate falls to nothing."""
    lr_power: Positive = 1.0
    """polynomial: exponent of what is left of the way."""
    decay_share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), FROM_YAML] = 0.2
    """wsd: share of all steps in which the rate falls at the end."""
    decay_shape: Literal["cosine", "linear", "1-sqrt"] = "cosine"
    """wsd: how it falls."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay (for sgd added to the gradient: L2); never on biases and norms."""
    no_decay: tuple[Text, ...] = ()
    """Names of further parameters without weight decay, such as `*embeddings*` (shell wildcards)."""
    l1: NotNegative = 0.0
    """L1 penalty: this times the sign of each trained weight is added to its gradient, where `weight_decay` acts; not part of the loss that is shown."""
    layer_lr_decay: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), FROM_YAML] = 1.0
    """Learning rate of each layer as a share of that of the layer above: the head 1, the last block this, the embeddings least."""
    beta1: Fraction | None = None
    """Decay of the first moment; left out, the optimiser's own: 0.9."""
    beta2: Fraction | None = None
    """Decay of the second moment; left out, the optimiser's own: 0.999, lion 0.99."""
    eps: Positive | None = None
    """AdamW's epsilon; left out, 1e-8."""
    momentum: Fraction | None = None
    """sgd and muon: decay of the momentum; left out, 0.9 and 0.95."""
    neftune_noise_alpha: Positive | None = None
    """NEFTune: uniform noise on the embeddings while training, at most this / sqrt(tokens x width); 5 is usual."""
    ema_decay: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False), FROM_YAML] | None = None
    """Keep an exponential moving average of the trained weights with this decay; `fleetune convert --ema` writes it."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is NaN or infinite does: `stop` names step, samples and layer; `skip` leaves the step's update out, counts it, and stops after 20 in a row."""
    max_grad_norm: Positive | None = 1.0
    """Global gradient norm is clipped to this; null for no clipping."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSection:
        _exactly_one(self, "max_steps", "num_epochs")
        given = [key for key in ("warmup_steps", "warmup_ratio", "warmup_tokens") if getattr(self, key)]
        if len(given) > 1:
            raise ValueError(f"has both `{given[0]}` and `{given[1]}`; remove one of them")
        return self


class ParallelSection(ShorthandSection):
    strategy: Strategy | Auto = "auto"
    """How the model state is sharded over the ranks: ddp, fsdp, hsdp (torch FSDP2, sharded within groups of ranks), zero1, zero2, zero3, hpz (zero3 with a second copy of the parameters in each group) of DeepSpeed."""
    micro_batch_size: PositiveInt | Auto = "auto"
    """Samples per rank in one forward and backward pass."""
    recompute: Literal["none", "full"] | Auto = "auto"
    """Activation checkpointing: `full` keeps only the input of each block and computes the rest again."""
    precision: Literal["fp32", "bf16", "fp16", "pure_bf16"] | Auto = "auto"
    """Arithmetic of forward and backward; `auto` follows the hardware. Master weights and moments stay fp32, but for `pure_bf16`, where all is bf16 (ddp, fsdp, hsdp). `fp16`, with a scaled loss, is DeepSpeed's."""
    shard_group_size: PositiveInt | Auto = "auto"
    """Ranks of a group, for hsdp and hpz: a divisor of their number, best those of one node."""
    reshard_after_forward: Bool | Auto = "auto"
    """fsdp and hsdp: free the gathered parameters after forward and gather them again for backward; false keeps them."""
    offload_optimizer: Offload | Auto = "auto"
    """Where the optimiser's state lies and is updated: on the device, in host memory, on NVMe (zero3 only)."""
    offload_params: Offload | Auto = "auto"
    """Where the sharded parameters lie between uses (zero3, fsdp and hsdp; NVMe zero3 only)."""
    nvme_path: Text | None = None
    """Folder on a local NVMe disk of every node; without it the planner offers no offload to NVMe."""
    deepspeed_preset: Text | None = None
    """DeepSpeed JSON with hand-tunable keys (a file, or a name from `ds_configs/`); DeepSpeed's strategies only."""


class ClusterSection(ShorthandSection):
    name: Text = "cpu"
    """A file of `slurm/clusters/` without its suffix, or a path to such a file."""
    nodes: PositiveInt = 1
    """Machines."""
    gpus_per_node: PositiveInt = 1
    """Accelerators, and so ranks, per machine (on a CPU cluster: ranks)."""


class LaunchSection(ShorthandSection):
    via: Literal["auto", "local", "torchrun", "deepspeed", "slurm", "kubernetes"] = "auto"
    """Who starts the ranks: `local` (this machine), `torchrun` or `deepspeed` (also on several machines), `slurm`, or a manifest for `kubernetes`; `auto`: torchrun."""
    hosts: Texts | None = None
    """Machines to start on over ssh, in the order of their ranks, `name` or `user@name`; each starts `cluster.gpus_per_node` ranks."""
    hostfile: Text | None = None
    """The same as a file of DeepSpeed's form, one `name slots=8` per line."""
    include: Text | None = None
    """Of those machines only these, as DeepSpeed writes them: `n1@n2:0,2` (all slots of n1, two of n2)."""
    exclude: Text | None = None
    """Of those machines without these: `n3@n4:7`."""
    remote: Literal["ssh", "pdsh"] = "ssh"
    """How the other machines are reached; `pdsh`: by DeepSpeed's own runner, with `via: deepspeed`."""
    ssh_options: tuple[Text, ...] = ()
    """Words for ssh, before the machine's name: `[-p, "2222"]`."""
    environment: tuple[Text, ...] = ()
    """Further environment variables that go to the ranks, by name; `*` ends a prefix. `--dry-run` shows the list."""
    max_restarts: Annotated[Int, Field(ge=0, le=1000)] = 3
    """Restarts from the newest checkpoint after a failure that may pass: a lost node, a killed rank, a NCCL error."""
    max_requeues: Annotated[Int, Field(ge=0, le=10000)] = 100
    """slurm: how often a job that was told to stop, by its time limit or a preemption, queues itself again."""
    min_nodes: PositiveInt | None = None
    """torchrun: go on with fewer machines, down to this many, and with those that come back; the plan is made again for what is there, with the same global batch."""

    @model_validator(mode="after")
    def _one_list_of_hosts(self) -> LaunchSection:
        if self.hosts is not None and self.hostfile is not None:
            raise ValueError("has both `hosts` and `hostfile`; remove one of them")
        if (self.include or self.exclude) and self.hosts is None and self.hostfile is None:
            raise ValueError("has `include` or `exclude`, but no `hostfile` to choose from; remove them, or add it")
        if self.include and self.exclude:
            raise ValueError("has both `include` and `exclude`; remove one of them")
        return self


class CheckpointSection(Section):
    every_steps: PositiveInt | None = None
    """Save after this many optimiser steps; the last step is always saved."""
    every_minutes: Positive | None = None
    """Save when this long has passed since the last save."""
    stop_after_minutes: Positive | None = None
    """Save and leave with exit code 75 this long after the start, where no batch system sends a signal before its time limit."""
    asynchronous: Bool = True
    """Copy the state to host memory, where it fits, and write it behind the next steps; false makes training wait for the disk."""
    keep_last: PositiveInt = 2
    """Newest complete checkpoints kept."""
    keep_every: PositiveInt | None = None
    """Kept for good: those whose step is a multiple of this."""
    keep_best: Annotated[Int, Field(ge=0)] = 0
    """Kept besides: this many with the best scores of the metric that chooses the best model."""
    copy_to: Text | None = None
    """Folder or URL (s3://, gs://, ..., through fsspec) to which each complete checkpoint is copied; nothing is deleted there."""
    resume: Resume = "auto"
    """Where `<output_dir>/checkpoints` holds complete checkpoints: `auto` goes on from the newest, whatever engine and number of ranks saved it; `weights_only` does so once with a fresh optimiser; `never` refuses to start."""
    fresh_data: Bool = False
    """Go on from a checkpoint, once, at the beginning of the data."""


class EvaluationSection(Section):
    every_steps: PositiveInt | None = None
    """Score the held-out samples after this many steps; they are always scored at the end."""
    max_samples: PositiveInt | None = None
    """Held-out samples scored during training, from the first on; left out, all."""
    metric: Text | None = None
    """The score that says which checkpoint is best (`loss`, `accuracy`, `f1`, ...): it is kept, and named at the end."""
    patience: PositiveInt | None = None
    """Stop early after this many evaluations without a better `metric`."""
    min_delta: NotNegative = 0.0
    """By how much a score must be better to count."""

    @model_validator(mode="after")
    def _metric_and_when(self) -> EvaluationSection:
        if self.metric is None and (self.patience is not None or self.min_delta):
            raise ValueError("has `patience` or `min_delta`, but no `metric` that they would be about; give one")
        if self.metric is not None and self.every_steps is None:
            raise ValueError("has a `metric` to choose the best step by, but scores only the last; give `every_steps`")
        return self


class TrackingSection(Section):
    log_every_steps: PositiveInt = 10
    """A record in `metrics.jsonl` and, when not on a terminal, a printed line, per this many steps."""
    to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Who else gets the records: `[tensorboard]` (files in `<output_dir>/tensorboard`), `wandb`, `mlflow`, `trackio`."""
    project: Text = "fleetune"
    """Project (MLflow: experiment) of the run there."""
    run_name: Text | None = None
    """Its name there; left out, the last part of `output_dir`."""
    hang_seconds: PositiveInt = 600
    """Every rank that sees no progress for so long writes its stack to `<output_dir>/logs/stacks-*.txt`."""


class SweepRange(Section):
    low: Number
    """Least value."""
    high: Number
    """Greatest value."""
    log: Bool = False
    """Drawn evenly by its logarithm, as learning rates are."""
    step: Number | None = None
    """Distance between the values; left out, 1 for integers and none for other numbers."""


class SweepSection(Section):
    parameters: Annotated[dict[Text, tuple[Bool | Int | float | Text | None, ...] | SweepRange], Field(min_length=1)]
    """What is varied, by dotted key: a list of values, or `{low: 1e-5, high: 1e-3, log: true}`."""
    trials: PositiveInt = 20
    """Runs that are made, those included that were given up."""
    metric: Text | None = None
    """The score that is searched for; left out, `evaluation.metric`, else `loss`."""
    pruning: Literal["median", "none"] = "median"
    """Give up on a trial whose score is worse than the median of the others at the same step; needs `evaluation.every_steps`."""


class JobSpec(Section):
    """One fine-tuning job, from the data to the scores."""

    output_dir: Text
    """Folder of the run: prepared data, plan, logs, metrics, checkpoints."""
    model: ModelSection
    """The model to start from."""
    task: TaskSection
    """What is learnt."""
    data: DataSection
    """What it is learnt from."""
    method: MethodSection = MethodSection()
    """Which parameters are updated."""
    training: TrainingSection
    """Batch, length, optimiser, schedule."""
    parallel: ParallelSection = ParallelSection()
    """How the work is laid over the ranks; `auto` lets the planner decide."""
    cluster: ClusterSection = ClusterSection()
    """The machines."""
    launch: LaunchSection = LaunchSection()
    """Who starts the ranks, where, and how often again."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When the state is saved."""
    evaluation: EvaluationSection = EvaluationSection()
    """When the held-out samples are scored."""
    tracking: TrackingSection = TrackingSection()
    """What is written down while it runs."""
    seed: Annotated[Int, Field(ge=0, lt=2**63)] = 0
    """Seed of the weights, the dropout and the data order."""
    sweep: SweepSection | None = None
    """What `fleetune sweep` varies: `{parameters: {training.lr: {low: 1e-5, high: 1e-3, log: true}}}`."""
    stages: tuple[dict[str, Any], ...] = ()
    """Runs one after the other: each a `name` and the keys that it changes; a stage starts from the last one's model."""

    @property
    def prepared_dir(self) -> str:
        return self.data.prepared or f"{self.output_dir}/data"

    @property
    def num_ranks(self) -> int:
        return self.cluster.nodes * self.cluster.gpus_per_node
