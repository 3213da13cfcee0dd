"""The same prompt through source and result: how far their logits are apart. Both models are in memory meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from launcher.errors import ABSENT, CheckpointError
from launcher.stored.state import State
from launcher.stored.values import whole
from tools.formats.expected import expected_tensors
from tools.formats.hf import read_config


class Difference(NamedTuple):
    largest: float
    """Between two logits."""
    mean: float
    same_first: float
    """Share of positions whose most likely token (or label) is the same."""

    def sentence(self) -> str:
        return (
            f"checked: logits apart by {self.largest:.3g} at most, {self.mean:.3g} on average; "
            f"{100 * self.same_first:.1f}% of positions have the same first choice"
        )


@torch.no_grad()
def compare_logits(source: State, config_dir: Path, result: Path, prompt: str) -> Difference:
    """Raises `CheckpointError` when there is no tokenizer for the prompt."""
    tokens = _tokens(config_dir, prompt)
    before = _model_of(source, config_dir)(**tokens).logits.float()
    kind = getattr(transformers, read_config(result)["architectures"][0])
    after = kind.from_pretrained(result, trust_remote_code=False).eval()(**tokens).logits.float()
    apart = (before - after).abs()
    same = (before.argmax(-1) == after.argmax(-1)).float().mean()
    return Difference(float(apart.max()), float(apart.mean()), float(same))


def _tokens(config_dir: Path, prompt: str) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(config_dir, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = f"needs a tokenizer, and none opens here ({str(error).partition(chr(10))[0]})"
        raise CheckpointError("--check", str(config_dir), rule, "name a folder that has one: --config DIR") from None
    tokens = tokenizer(prompt, return_tensors="pt")
    if not tokens["input_ids"].numel():
        raise CheckpointError("--check", ABSENT, "has a prompt without a token", "give a few words")
    return {name: value for name, value in tokens.items() if name != "token_type_ids"}


def _model_of(source: State, config_dir: Path) -> Any:
    """The model with the source's weights, in fp32."""
    expected = expected_tensors(config_dir, read_config(config_dir))
    settings = transformers.AutoConfig.from_pretrained(config_dir, trust_remote_code=False)
    model = getattr(transformers, expected.architecture)(settings).float()
    known = {*source.tensors, *source.aliases}
    found = {name: source.tensors[source.aliases.get(name, name)] for name in known if name in model.state_dict()}
    model.load_state_dict({name: whole(values).float() for name, values in found.items()}, strict=False)
    model.tie_weights()
    return model.eval()
