"""What a checkpoint carries beside the weights: config, tokenizer, generation settings, the adapters' config."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from launcher.data.prepared import PreparedData
from launcher.train.base import ADAPTER
from launcher.train.engine import has_segments


def write_model_files(model: Any, data: PreparedData, folder: Path) -> None:
    """Config and tokenizer of the trained model, and of its adapters: with the weights, all that inference needs."""
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the base, which is named and not saved
    config.save_pretrained(folder)
    for adapter in getattr(model, "peft_config", {}).values():
        adapter.save_pretrained(folder / ADAPTER)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_dir, trust_remote_code=False)
    if has_segments(model.config) and "token_type_ids" not in tokenizer.model_input_names:
        # a tokenizer of ours does not know its model: now it gives pairs as the model learnt them
        tokenizer.model_input_names = [*tokenizer.model_input_names, "token_type_ids"]
    tokenizer.save_pretrained(folder)
