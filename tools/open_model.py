"""Opens a model folder to be scored, and refuses one that would be scored with weights drawn at random.

Plain transformers and peft; code from the folder runs only where it is trusted by name.
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


def open_model(folder: Path, auto_class: str, task: str, device_map: str | None = None, trust: bool = False) -> Any:
    """The model in eval mode, on the accelerator if there is one. Raises `ModelError`.

    On a CPU it computes in fp32 whatever the file holds: widening is exact, and many CPUs only emulate bf16.
    device_map: `auto` spreads a model that is larger than one device, as accelerate does. trust: run the folder's code.
    """
    if not folder.is_dir():
        raise ModelError("MODEL", str(folder), "is not a folder", "give a folder with config.json and weights")
    model, info = _opened(folder, auto_class, device_map, trust)
    _check_head(folder, task, model, lacking_keys(info))
    return _placed(model, device_map)


def open_adapted(folder: Path, auto_class: str, task: str, device_map: str | None = None, trust: bool = False) -> Any:
    """The same for a folder of peft: the base it names, with the adapters merged into it."""
    from peft import PeftConfig, PeftModel

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _unopened(folder, "peft", error) from None
    base = Path(str(config.base_model_name_or_path))
    if not base.is_dir():
        rule = f"has adapters of {base}, which is not a folder"
        raise ModelError("MODEL", str(folder), rule, "mend base_model_name_or_path in adapter_config.json")
    model, info = _opened(base, auto_class, device_map, trust)
    learnt = tuple(getattr(config, "modules_to_save", None) or ())
    lacking = [key for key in lacking_keys(info) if not any(part in learnt for part in key.split("."))]
    _check_head(folder, task, model, lacking, is_adapted=True)
    try:
        with quiet_libraries():
            adapted = PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _unopened(folder, "peft", error) from None
    return _placed(adapted, device_map)


def _placed(model: Any, device_map: str | None) -> Any:
    if device_map is not None:
        return model.eval()
    return model.to(f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu").eval()


def _opened(folder: Path, auto_class: str, device_map: str | None, trust: bool) -> tuple[Any, dict[str, Any]]:
    config = _trusted_config(folder) if trust else config_of_folder(str(folder), {}, where="MODEL")
    more = {} if device_map is None else {"device_map": device_map}
    dtype: Any = "auto" if torch.cuda.is_available() else torch.float32
    try:
        with quiet_libraries():
            opened = head_class(auto_class).from_pretrained(
                folder, config=config, dtype=dtype, trust_remote_code=trust, output_loading_info=True, **more
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _unopened(folder, auto_class, error) from None
    return opened[0], opened[1]


def _trusted_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unopened(folder, "AutoConfig", error) from None


def _unopened(folder: Path, opener: str, error: Exception) -> ModelError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
    way_out = "give a folder that `save_pretrained` or `fleetune convert` wrote"
    return ModelError("MODEL", str(folder), f"cannot be opened by {opener} ({reason})", way_out)


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


def lacking_keys(info: dict[str, Any]) -> list[str]:
    """Weights that the folder does not hold, or not of that shape: transformers draws them at random and only warns."""
    return sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})


def _check_head(folder: Path, task: str, model: Any, lacking: list[str], is_adapted: bool = False) -> None:
    way_out = f"give a model that was trained for {task}"
    if lacking:
        named = ", ".join(lacking[:4]) + (f" and {len(lacking) - 4} more" if len(lacking) > 4 else "")
        raise ModelError("MODEL", str(folder), f"has no weights for {named}", way_out)
    # a tied head hides that the checkpoint had another one, and BERT's masked-word head opens as a causal one
    saved_as = model.config.architectures or [type(model).__name__]
    if type(model).__name__ not in saved_as and not is_adapted:
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
