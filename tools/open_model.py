"""Opens a model folder to be scored, and refuses one that would be scored with weights drawn at random.

Plain transformers, never code from the folder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from launcher.cost.architecture import config_of_folder, head_class
from launcher.errors import ABSENT, ModelError


def open_model(folder: Path, auto_class: str, task: str) -> Any:
    """The model in eval mode, on the accelerator if there is one. Raises `ModelError`.

    On a CPU it computes in fp32 whatever the file holds: widening is exact, and many CPUs only emulate bf16.
    """
    if not folder.is_dir():
        raise ModelError("MODEL", str(folder), "is not a folder", "give a folder with config.json and weights")
    config = config_of_folder(str(folder), {}, where="MODEL")
    on_cuda = torch.cuda.is_available()
    model, info = _opened(folder, auto_class, config, "auto" if on_cuda else torch.float32)
    _check_head(folder, task, model, info)
    return model.to("cuda" if on_cuda else "cpu").eval()


def _opened(folder: Path, auto_class: str, config: Any, dtype: Any) -> tuple[Any, dict[str, Any]]:
    try:
        with quiet_libraries():
            opened = head_class(auto_class).from_pretrained(
                folder, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
        way_out = "give a folder that `save_pretrained` or `fleetune convert` wrote"
        raise ModelError("MODEL", str(folder), f"cannot be opened by {auto_class} ({reason})", way_out) from None
    return opened[0], opened[1]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Our own messages say what is missing; the libraries' warnings and bars on the same would come on top."""
    from transformers.utils import logging as bars

    disabled, has_bar = logging.root.manager.disable, bars.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    bars.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(disabled)
        if has_bar:
            bars.enable_progress_bar()


def _check_head(folder: Path, task: str, model: Any, info: dict[str, Any]) -> None:
    """transformers draws what a checkpoint lacks at random and only warns."""
    lacking = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    way_out = f"give a model that was trained for {task}"
    if lacking:
        named = ", ".join(lacking[:4]) + (f" and {len(lacking) - 4} more" if len(lacking) > 4 else "")
        raise ModelError("MODEL", str(folder), f"has no weights for {named}", way_out)
    # a tied head hides that the checkpoint had another one, and BERT's masked-word head opens as a causal one
    saved_as = model.config.architectures or [type(model).__name__]
    if type(model).__name__ not in saved_as:
        rule = f"was saved as {', '.join(saved_as)}, not as {type(model).__name__}"
        raise ModelError("MODEL", str(folder), rule, way_out)


def labels_of(model: Any) -> tuple[str, ...]:
    """Names of the classes by id, from the config's `id2label`."""
    names = model.config.id2label
    return tuple(str(names[i]) for i in sorted(names))


def check_vocabulary(model: Any, num_token_ids: int, where: str) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if num_token_ids > rows:
        rule = f"has tokens up to id {num_token_ids - 1}, the model embeddings for {rows}"
        raise ModelError(where, ABSENT, rule, "use the model's own tokenizer")


def check_length(model: Any, seq_len: int, where: str) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise ModelError(where, seq_len, f"is more tokens than the model's {limit} positions", f"give at most {limit}")
