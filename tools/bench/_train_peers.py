"""Body of a process of the training benchmark: one peer trains a case, one line of JSON says how. Only the rows are ours.

    _train_peers PEER CASE.json

Every peer sees the same rows in the same global batches, pads them as transformers' collators do, and takes the same steps
of AdamW. Timed are whole steps, data included, from the first that is not warm-up on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from launcher.data.order import GlobalOrder

Batch = dict[str, torch.Tensor]


class Case:
    """What is trained: see `train.py`, which writes it."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw, self.size, self.num_steps, self.lr = raw, raw["batch"], raw["steps"], raw["lr"]
        self.data = datasets.load_from_disk(raw["prepared"])["train"]
        self.pad_id = raw["pad_id"]
        order = GlobalOrder(len(self.data), raw["seed"])
        self.ids = order.samples(0, self.size * self.num_steps).tolist()

    def rows(self) -> list[dict[str, Any]]:
        """In the order of the steps, with `labels` as transformers wants them."""
        return [self._row(self.data[i]) for i in self.ids]

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        ids = list(row["input_ids"])
        if "label" in row:
            return {"input_ids": ids, "labels": int(row["label"])}
        mask = row.get("loss_mask") or [1] * len(ids)
        return {"input_ids": ids, "labels": [i if m else -100 for i, m in zip(ids, mask, strict=True)]}

    def collated(self, rows: list[dict[str, Any]]) -> Batch:
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, fill: int) -> torch.Tensor:
            return torch.tensor([[*row[name], *[fill] * (longest - len(row[name]))] for row in rows])

        ones = [{"mask": [1] * len(row["input_ids"])} for row in rows]
        mask = torch.tensor([[*one["mask"], *[0] * (longest - len(one["mask"]))] for one in ones])
        is_single = isinstance(rows[0]["labels"], int)
        labels = torch.tensor([row["labels"] for row in rows]) if is_single else padded("labels", -100)
        return {"input_ids": padded("input_ids", self.pad_id), "attention_mask": mask, "labels": labels}

    def model(self) -> Any:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.manual_seed(self.raw["seed"])
        kind = getattr(transformers, self.raw["auto_class"])
        overrides = {"num_labels": 2} if "label" in self.data.column_names else {}
        model = kind.from_pretrained(self.raw["model"], dtype=torch.float32, **overrides)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.use_cache = False
        return model.train()

    def optimizer(self, model: Any) -> torch.optim.AdamW:
        return torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.0)


class Clock:
    """Seconds and losses of the steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.ends: list[float] = []

    def step(self, loss: float) -> None:
        self.losses.append(loss)
        self.ends.append(time.perf_counter())


def bare(case: Case, clock: Clock) -> None:
    """A PyTorch loop as one would write it: a DataLoader, forward, backward, clip, step."""
    model = case.model()
    optimizer = case.optimizer(model)
    for batch in _loader(case):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(loss.item())


def accelerate(case: Case, clock: Clock) -> None:
    from accelerate import Accelerator  # type: ignore[import-untyped]

    helper = Accelerator(cpu=True)
    model = case.model()
    model, optimizer, loader = helper.prepare(model, case.optimizer(model), _loader(case))
    for batch in loader:
        loss = model(**batch).loss
        helper.backward(loss)
        helper.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(loss.item())


def _loader(case: Case) -> Any:
    return torch.utils.data.DataLoader(case.rows(), batch_size=case.size, collate_fn=case.collated)  # type: ignore[arg-type]


def trainer(case: Case, clock: Clock) -> None:
    """transformers' Trainer as it comes: one pass over the batch, padded to its longest row."""
    rows = case.rows()

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    class Clocked(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                clock.step(float(logs["loss"]))

    arguments = transformers.TrainingArguments(
        output_dir=case.raw["scratch"],
        per_device_train_batch_size=case.size,
        max_steps=case.num_steps,
        learning_rate=case.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=case.raw["seed"],
    )
    InOrder(
        model=case.model(),
        args=arguments,
        train_dataset=rows,
        data_collator=case.collated,
        callbacks=[Clocked()],
    ).train()


PEERS = {peer.__name__: peer for peer in (bare, accelerate, trainer)}


def tokens_of(case: Case) -> Iterator[int]:
    """Valid tokens of each step."""
    lengths = [len(case.data[i]["input_ids"]) for i in case.ids]
    for start in range(0, len(lengths), case.size):
        yield sum(lengths[start : start + case.size])


def main() -> None:
    peer, path = sys.argv[1:]
    case, clock = Case(json.loads(Path(path).read_text())), Clock()
    PEERS[peer](case, clock)
    seconds = [end - begin for begin, end in zip(clock.ends, clock.ends[1:], strict=False)]
    found = {"losses": clock.losses, "seconds": seconds, "tokens": list(tokens_of(case))}
    print(json.dumps(found), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
