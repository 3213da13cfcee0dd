"""Staged runs from one spec: each stage is the spec with some keys changed, starting from the model of the last one.

    stages:
      - {name: continue, data: {train: corpus.txt}, training: {max_steps: 500}}
      - {name: chat, task: chat, data: {train: chats.jsonl}, method: lora}

A stage works in `<output_dir>/<name>`; its model, once finished, lies in `<output_dir>/<name>/model`.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from launcher.errors import ABSENT, SpecError

STAGE = "stage"
"""The word of `--set stage=NAME`; no key of a spec."""


def stage_names(raw: dict[str, Any]) -> list[str]:
    """In order; [] for a spec without stages. Raises `SpecError` for stages that cannot be told apart."""
    stages = raw.get("stages") or []
    if not isinstance(stages, list):
        raise SpecError("stages", str(stages), "must be a list of sections", "write `- {name: first, ...}` lines")
    names: list[str] = []
    for number, stage in enumerate(stages):
        name = stage.get("name") if isinstance(stage, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            rule = "must be a name that can be a folder"
            raise SpecError(f"stages.{number}.name", ABSENT if name is None else name, rule, "e.g. `name: chat`")
        if name in names:
            raise SpecError(f"stages.{number}.name", name, "is the name of two stages", "name each differently")
        names.append(name)
    return names


def one_stage(raw: dict[str, Any]) -> dict[str, Any]:
    """The spec of the stage that `stage` names; one without stages as it is. Raises `SpecError`."""
    names = stage_names(raw)
    if not names:
        return raw
    name = raw.get(STAGE)
    if name not in names:
        rule = f"is none of the stages {', '.join(names)}" if name is not None else "must be chosen here"
        way_out = f"--set {STAGE}={names[0]}; `fleetune launch` without it runs them all, one after the other"
        raise SpecError(STAGE, ABSENT if name is None else name, rule, way_out)
    number = names.index(name)
    common = {key: value for key, value in raw.items() if key not in ("stages", STAGE)}
    own = {key: value for key, value in raw["stages"][number].items() if key != "name"}
    spec = _merged(common, own)
    root = str(raw.get("output_dir"))
    spec["output_dir"] = f"{root}/{name}"
    if number:
        spec["model"] = {"path": model_folder(root, names[number - 1])}
        spec["data"] = _with_its_tokenizer(spec.get("data"), own.get("data"))
    return spec


def model_folder(output_dir: str, stage: str) -> str:
    return f"{output_dir}/{stage}/model"


def _merged(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Section by section: a key of the stage's replaces the spec's; a section that is one word is replaced whole."""
    merged = copy.deepcopy(common)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    if "max_steps" in own.get("training", {}):
        merged["training"].pop("num_epochs", None) if "num_epochs" not in own["training"] else None
    elif "num_epochs" in own.get("training", {}):
        merged["training"].pop("max_steps", None)
    return merged


def _with_its_tokenizer(data: Any, own: Any) -> Any:
    """A model that was trained has a tokenizer: that of the first stage's data is not made or taken again."""
    if not isinstance(data, dict):
        return data
    keep = own if isinstance(own, dict) else {}
    return {key: value for key, value in data.items() if key not in ("tokenizer", "train_tokenizer") or key in keep}
