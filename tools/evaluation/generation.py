"""What a model writes, against what it should have written: exact match, BLEU and chrF (sacrebleu), ROUGE (rouge-score).

Greedy, so that there is one answer. Corpus scores follow from the libraries' own counts per example, so that resamples and
slices are scored by the libraries as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launcher.errors import ABSENT, DataError, ModelError, UserError
from launcher.task import Record
from launcher.task.scores import mean
from tools.evaluation.fields import Fields, filled
from tools.evaluation.opened import Opened
from tools.evaluation.values import Floats, Measure, Outcome, Part, Table

ROUGES = ("rouge1", "rouge2", "rougeL")
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


class Generation:
    name = "generation"
    auto_class = "AutoModelForCausalLM"
    headline = "exact_match"

    def __init__(
        self,
        tokenizer: Any,
        limit: int,
        fields: Fields,
        *,
        max_new_tokens: int = 128,
        stop: tuple[str, ...] = (),
        extract: str = "text",
        is_chat: bool = False,
    ) -> None:
        if not 1 <= max_new_tokens < limit:
            rule = f"is not between 1 and {limit - 1}: the model takes {limit} tokens, prompt and answer together"
            raise DataError("--max-new-tokens", max_new_tokens, rule, "give fewer")
        if is_chat and tokenizer.chat_template is None:
            rule = "has no effect: the tokenizer has no chat template"
            raise DataError("--apply-chat-template", ABSENT, rule, "leave it out")
        self.tokenizer = tokenizer
        self.limit = limit
        self.fields = fields
        self.max_new_tokens = max_new_tokens
        self.stop = stop
        """Texts at which an answer ends, themselves left out."""
        self.extract = extract
        """What is compared: the whole `text`, or its last `number` (after `####`, where that stands, as in GSM8K)."""
        self.is_chat = is_chat
        self._bleu, self._chrf, self._rouge = _libraries()

    def parts(self, records: Iterable[Record]) -> Iterator[list[Part]]:
        for example, record in enumerate(records):
            prompt = filled(self.fields.prompt or "{prompt}", self.fields, record)
            ids = self._prompt_ids(prompt)[-(self.limit - self.max_new_tokens) :]
            facts = {"length": len(ids), "references": self._references(record), **self.fields.facts(record)}
            yield [Part(example, 0, {"input_ids": ids}, facts)]

    def _prompt_ids(self, prompt: str) -> list[int]:
        if self.is_chat:
            turns = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            return list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        return list(self.tokenizer(prompt, verbose=False)["input_ids"])

    def _references(self, record: Record) -> list[str]:
        value = self.fields.value("answer", record)
        found = value if isinstance(value, list) else [value]
        found = [str(one) if isinstance(one, int | float) and not isinstance(one, bool) else one for one in found]
        if not found or not all(isinstance(one, str) for one in found):
            where = f"{record.where}: {self.fields.name('answer')}"
            raise DataError(where, value, "is neither a text nor a list of texts", "give what should be written")
        return found

    def score(self, model: Opened, parts: list[Part]) -> list[Outcome]:
        if len(model.modules) > 1:
            raise ModelError("--ensemble", ABSENT, "cannot write: generation takes one model", "leave it out")
        rows = [part.row["input_ids"] for part in parts]
        longest = max(map(len, rows))
        pad = model.pad_id
        inputs = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in rows], device=model.device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows], device=model.device)
        written = model.modules[0].generate(input_ids=inputs, attention_mask=mask, **self._settings(pad))
        texts = self.tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
        return [{"prediction": self._cut(text)} for text in texts]

    def _settings(self, pad: int) -> dict[str, Any]:
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria

        settings: dict[str, Any] = {
            "generation_config": GenerationConfig(
                do_sample=False,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=pad,
            ),
            "logits_processor": LogitsProcessorList([_refuse_nan]),
        }
        if self.stop:
            criterion = StopStringCriteria(self.tokenizer, list(self.stop))
            settings["stopping_criteria"] = StoppingCriteriaList([criterion])
        return settings

    def _cut(self, text: str) -> str:
        ends = [text.index(stop) for stop in self.stop if stop in text]
        return text[: min(ends)] if ends else text

    def merged(self, facts: Mapping[str, Any], outcomes: list[Outcome]) -> Outcome:
        text, references = outcomes[0]["prediction"].strip(), facts["references"]
        wanted = [self._extracted(reference) for reference in references]
        right = int(self._extracted(text) in wanted and self._extracted(text) is not None)
        rouge = [self._rouge.score(reference, text) for reference in references]
        return {
            "prediction": text,
            "extracted": self._extracted(text),
            "right": right,
            "bleu_counts": _counts(self._bleu, text, references),
            "chrf_counts": _counts(self._chrf, text, references),
            **{name: max(scores[name].fmeasure for scores in rouge) for name in ROUGES},
        }

    def _extracted(self, text: str) -> str | None:
        return text.strip() if self.extract == "text" else last_number(text)

    def measure(self, table: Table) -> Measure:
        columns = np.stack([table.columns[name] for name in ("right", *ROUGES)], axis=1)
        counts = {name: table.columns[f"{name}_counts"] for name in ("bleu", "chrf")}
        metrics = {"bleu": self._bleu, "chrf": self._chrf}

        def scores(weights: Floats) -> dict[str, Floats]:
            number = weights.sum(1)
            means = (weights @ columns).T
            found = {"exact_match": mean(means[0], number)}
            for name, metric in metrics.items():
                sums = (weights @ counts[name]).astype(int).tolist()
                found[name] = np.array([metric._compute_score_from_stats(row).score for row in sums])
            return found | {name: mean(total, number) for name, total in zip(ROUGES, means[1:], strict=True)}

        return scores


def _libraries() -> tuple[Any, Any, Any]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        rule = f"needs the package {str(error.name).partition('.')[0]}"
        raise UserError("--task generation", ABSENT, rule, "pip install 'fleetune[generation]'") from None
    return BLEU(), CHRF(), RougeScorer(list(ROUGES), use_stemmer=False)


def _counts(metric: Any, text: str, references: list[str]) -> list[int]:
    """sacrebleu's own statistics of one sentence: what its corpus scores, and its own bootstrap, are made from."""
    (counts,) = metric._extract_corpus_statistics([text], [[reference] for reference in references])
    return [int(count) for count in counts]


def last_number(text: str) -> str | None:
    """The number after `####`, else the last one, without separators, sign of currency, or a point with only 0s behind."""
    found = _NUMBER.findall(text.rpartition("####")[2]) if "####" in text else []
    found = found or _NUMBER.findall(text)
    if not found:
        return None
    number = found[-1].replace(",", "").replace("$", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def _refuse_nan(ids: Tensor, scores: Tensor) -> Tensor:
    """Greedy choice among NaN takes any token without a word."""
    if bool(scores.isnan().any()):
        raise ModelError("MODEL", ABSENT, "gives logits that are not numbers (NaN)", "look at the end of its training")
    return scores
