"""The tasks of lm-evaluation-harness, local YAML ones included, asked of our models: its API, our loader and batches.

The harness makes the requests and the scores; the log-likelihoods and the texts come from `likelihood.py` and transformers
as everywhere here. Only local tasks are indexed unless asked otherwise: its own index of thousands takes 20 s to read.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from launcher.errors import ABSENT, UserError
from tools.evaluation.asked import seq_len_of, tokenizer_of
from tools.evaluation.batches import Budget, batches, scored
from tools.evaluation.fields import Fields
from tools.evaluation.intervals import Interval
from tools.evaluation.likelihood import Perplexity, likelihoods, rolling
from tools.evaluation.opened import Opened
from tools.evaluation.values import Part

NORMAL = 1.959964  # standard errors on both sides that hold 95%
_NO_HARNESS = "pip install 'fleetune[eval]'"


def harness_scores(model: Opened, options: argparse.Namespace) -> tuple[dict[str, Interval], int]:
    """`TASK/METRIC` -> the harness's score, and its interval by the harness's standard error; and how many examples.

    Raises UserError: no harness, no such task, a task that the model cannot do.
    """
    tokenizer = tokenizer_of(model, options)
    budget = Budget.of(int(model.config.vocab_size), options.max_batch_tokens, options.batch_size)
    seq_len = seq_len_of(model, options)
    found = _evaluated(_adapter(model, tokenizer, seq_len, budget), options)
    scores = {
        f"{task}/{key.partition(',')[0]}": _interval(key, value, row.get(key.replace(",", "_stderr,", 1)))
        for task, row in found["results"].items()
        for key, value in row.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    return scores, sum(len(samples) for samples in found["samples"].values())


def _interval(name: str, value: float, error: Any) -> Interval:
    """Normal around the value; of a perplexity, around its logarithm, since it is never below 1."""
    if not isinstance(error, int | float) or math.isnan(error):
        return Interval(float(value), math.nan, math.nan)
    if "perplexity" in name:
        factor = math.exp(NORMAL * error / value)
        return Interval(float(value), value / factor, value * factor)
    return Interval(float(value), value - NORMAL * error, value + NORMAL * error)


def _evaluated(adapter: Any, options: argparse.Namespace) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = options.include_path
    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
    unknown = [name for name in options.harness if name not in manager.all_tasks]
    if unknown:
        known = ", ".join(sorted(manager.all_tasks)[:8]) or "none"
        rule = f"is no task of {folder or 'lm-evaluation-harness'}, which has {known}"
        raise UserError("--harness", unknown[0], rule, "name one of these, or another --include-path")
    with contextlib.redirect_stdout(sys.stderr):  # it prints how far its bootstrap is
        found = simple_evaluate(
            model=adapter,
            tasks=list(options.harness),
            task_manager=manager,
            limit=options.limit,
            bootstrap_iters=options.resamples,
            log_samples=True,
        )
    assert found is not None, "only ranks of its own distribution get nothing"
    return dict(found)


def _adapter(model: Opened, tokenizer: Any, limit: int, budget: Budget) -> Any:
    """An `LM` of the harness. Made here, so that its package is imported only where it is asked for."""
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise UserError("--harness", ABSENT, "needs lm-evaluation-harness", _NO_HARNESS) from None
    pairs = Perplexity(tokenizer, limit, Fields(), stride=1)

    class Fleetune(LM):
        """Its requests, in our batches."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            rows = [pairs.pairs("a request", request.args[0], [request.args[1]])[0] for request in requests]
            found = _scored(rows, lambda parts: likelihoods(model, parts), budget)
            return [(outcome["nats"], bool(outcome["greedy"])) for outcome in found]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            start, rows, owners = pairs.start(), [], []
            for number, request in enumerate(requests):
                windows = rolling([start, *pairs.encode([request.args[0]])[0]], limit, stride=1)
                rows += windows
                owners += [number] * len(windows)
            sums = [0.0] * len(requests)
            found = _scored(rows, lambda parts: likelihoods(model, parts), budget)
            for owner, outcome in zip(owners, found, strict=True):
                sums[owner] += outcome["nats"]
            return sums

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [_written(model, tokenizer, limit, *request.args) for request in requests]

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return str(
                tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

        @property
        def tokenizer_name(self) -> str:
            return str(model.folder).replace("/", "__")

    return Fleetune()


def _scored(rows: Sequence[dict[str, Any]], score: Callable[[list[Part]], Any], budget: Budget) -> list[Any]:
    """In the order of the requests."""
    found: dict[int, Any] = {}
    parts = [Part(number, 0, row, {}) for number, row in enumerate(rows)]
    with torch.inference_mode():
        for batch in batches(parts, budget):
            for part, outcome in zip(batch, scored(batch, score, budget), strict=True):
                found[part.example] = outcome
    return [found[number] for number in range(len(rows))]


def _written(model: Opened, tokenizer: Any, limit: int, context: str, settings: dict[str, Any]) -> str:
    from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria

    until = settings.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    num_new = int(settings.get("max_gen_toks", settings.get("max_new_tokens", 256)))
    if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0:
        raise UserError("--harness", ABSENT, "has a task that samples: no two runs would agree", "set do_sample: false")
    ids = tokenizer(context, return_tensors="pt")["input_ids"][:, -max(1, limit - num_new) :].to(model.device)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=num_new, eos_token_id=tokenizer.eos_token_id, pad_token_id=model.pad_id
    )
    stopping = StoppingCriteriaList([StopStringCriteria(tokenizer, stops)] if stops else [])
    with torch.inference_mode():
        written = model.modules[0].generate(ids, generation_config=config, stopping_criteria=stopping)
    text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    ends = [text.index(stop) for stop in stops if stop and stop in text]
    return str(text[: min(ends)] if ends else text)
