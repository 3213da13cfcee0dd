"""NEFTune (Jain et al. 2023): noise on the embeddings while training; transformers' own hook."""

from __future__ import annotations

from typing import Any


def add_noise(model: Any, alpha: float) -> None:
    """Uniform noise of at most alpha / sqrt(tokens x width) on every embedded token, drawn anew in each forward pass."""
    from transformers.integrations.neftune import neftune_post_forward_hook  # which imports peft, seconds of a start

    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = alpha
    embeddings.register_forward_hook(neftune_post_forward_hook)
