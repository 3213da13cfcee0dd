"""Opens whatever holds a model: a folder of transformers or of peft, a run or a step of it, a ZeRO or DCP checkpoint.

A checkpoint is converted once by `tools.convert` into a folder of the cache, named by what it holds. Several models are an
ensemble: their probabilities are averaged, or each has a vote. Code in a folder runs only where `trust` says so.
"""

from __future__ import annotations

import inspect
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from launcher.checksum import file_digest
from launcher.errors import ABSENT, ModelError
from launcher.job.resources import cache_dir
from launcher.task import Batch, logits_of
from launcher.train.engine import model_inputs
from launcher.train.manifest import MANIFEST
from tools.convert import convert
from tools.formats.locate import Checkpoint, has_adapter, locate
from tools.open_model import open_adapted, open_model

Combine = Literal["mean", "vote"]
KEPT = 3  # conversions in the cache: the one that is scored, the one it is compared with, one more
PREFIXES = ("zero:", "dcp:")
_WEIGHTS = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")


@dataclass(frozen=True)
class Place:
    """Where a model lies once it can be opened."""

    name: str
    """As the user named it."""
    folder: Path
    fingerprint: str
    """Of the weights and the config."""


@dataclass
class Opened:
    name: str
    folder: Path
    fingerprint: str
    modules: list[Any]
    combine: Combine = "mean"
    keeps_logits: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self.keeps_logits = [
            "logits_to_keep" in inspect.signature(module.forward).parameters for module in self.modules
        ]

    @property
    def config(self) -> Any:
        return self.modules[0].config

    @property
    def device(self) -> torch.device:
        return torch.device(self.modules[0].device)

    @property
    def pad_id(self) -> int:
        """The mask hides it. Classifiers of decoders find a text's end by the config's own, which thus must be set."""
        for module in self.modules:
            if module.config.pad_token_id is None:
                module.config.pad_token_id = 0
        return int(self.config.pad_token_id)

    def next_token_logits(self, input_ids: Tensor, keep: int) -> Tensor:
        """Logits of the last `keep` positions (B, keep, V) of rows padded on the right, which nothing before them sees."""

        def of(module: Any, keeps: bool) -> Tensor:
            some = {"logits_to_keep": keep} if keeps else {}
            logits: Tensor = module(input_ids=input_ids, use_cache=False, **some).logits
            return logits[:, -keep:]

        return self._combined([of(*pair) for pair in zip(self.modules, self.keeps_logits, strict=True)], "classes")

    def logits(self, batch: Batch, kind: str = "classes") -> Tensor:
        """What the head says (B, ..., C). kind: `classes`, of which one is right; `answers`, each yes or no; `numbers`."""
        return self._combined([logits_of(m(**model_inputs(batch, m.config))) for m in self.modules], kind)

    def _combined(self, logits: list[Tensor], kind: str) -> Tensor:
        if len(logits) == 1:
            return logits[0]
        every = torch.stack([one.float() for one in logits])
        if kind == "numbers":
            return every.mean(0)
        if kind == "answers":
            return torch.logit(every.sigmoid().mean(0) if self.combine == "mean" else _shares(every > 0))
        shares = torch.softmax(every, dim=-1).mean(0)
        if self.combine == "mean":
            return shares.log()
        votes = torch.nn.functional.one_hot(every.argmax(-1), every.shape[-1]).float().mean(0)
        # a tie of votes goes to the likelier class; no probability is 0, so every loss is finite
        return (0.99 * votes + 0.01 * shares).log()


def _shares(yes: Tensor) -> Tensor:
    return yes.float().mean(0).clamp(0.01, 0.99)


def find(name: str, where: str = "MODEL") -> Place:
    """The folder to open. Converts a checkpoint, so of several ranks one does it. Raises UserError."""
    path = Path(name)
    if not name.startswith(PREFIXES) and (not path.is_dir() or _is_folder(path)):
        if not path.is_dir():
            raise ModelError(where, name, "is not a folder", "give a model folder, a run, or a checkpoint")
        return Place(name, path, _fingerprint(path))
    kind = name.partition(":")[0] if name.startswith(PREFIXES) else None
    checkpoint = locate(Path(name.partition(":")[2]) if kind else path, kind)  # type: ignore[arg-type]
    return _converted(name, checkpoint)


def _is_folder(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.json", "adapter_config.json")) or not any(path.iterdir())


def _converted(name: str, checkpoint: Checkpoint) -> Place:
    fingerprint = _checkpoint_fingerprint(checkpoint)
    folder = cache_dir() / "converted" / fingerprint
    if not folder.is_dir():
        sys.stderr.write(f"converting {name} into {folder}\n")
        folder.parent.mkdir(parents=True, exist_ok=True)
        adapted = checkpoint.config_dir is not None and has_adapter(checkpoint.config_dir)
        convert(f"{checkpoint.kind}:{checkpoint.folder}", f"hf:{folder}", merge=adapted)
        _forget_old(folder.parent)
    folder.touch()
    return Place(name, folder, fingerprint)


def _forget_old(parent: Path) -> None:
    """The newest stay. What another process is reading is open, or is converted again."""
    newest_first = sorted((path for path in parent.iterdir() if path.is_dir()), key=lambda path: -path.stat().st_mtime)
    for path in newest_first[KEPT:]:
        shutil.rmtree(path, ignore_errors=True)


def _checkpoint_fingerprint(checkpoint: Checkpoint) -> str:
    """Of ours, the manifest's: it holds the checksum of every file. Of others, what the file system says."""
    if checkpoint.step_dir is not None:
        return file_digest(checkpoint.step_dir / MANIFEST)
    facts = sorted(
        (file.relative_to(checkpoint.folder).as_posix(), file.stat().st_size, file.stat().st_mtime_ns)
        for file in checkpoint.folder.rglob("*")
        if file.is_file()
    )
    return blake2b(repr((str(checkpoint.folder), facts)).encode(), digest_size=16).hexdigest()


def _fingerprint(folder: Path) -> str:
    files = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    return fingerprint_of(files)


def fingerprint_of(files: list[Path]) -> str:
    """Of the bytes of files, whatever they are called."""
    digest = blake2b(digest_size=16)
    for path in files:
        with suppress(OSError):  # what cannot be read is named where it is opened
            digest.update(file_digest(path).encode())
    return digest.hexdigest()


def opened(
    found: list[Place],
    auto_class: str,
    task: str,
    combine: Combine = "mean",
    device_map: str | None = None,
    trust: bool = False,
) -> Opened:
    """The model, or the ensemble of several."""
    modules = [_module(one, auto_class, task, device_map, trust) for one in found]
    shapes = {(module.config.vocab_size, tuple((module.config.id2label or {}).values())) for module in modules}
    if len(shapes) > 1:
        rule = "differ in vocabulary or labels, so their probabilities are not of the same things"
        raise ModelError("--ensemble", ABSENT, rule, "give models that were trained from one on one set of labels")
    fingerprint = found[0].fingerprint
    if len(found) > 1:
        joined = combine + "".join(one.fingerprint for one in found)
        fingerprint = blake2b(joined.encode(), digest_size=16).hexdigest()
    return Opened(" + ".join(one.name for one in found), found[0].folder, fingerprint, modules, combine)


def _module(found: Place, auto_class: str, task: str, device_map: str | None, trust: bool) -> Any:
    if (found.folder / "adapter_config.json").is_file():
        return open_adapted(found.folder, auto_class, task, device_map, trust)
    return open_model(found.folder, auto_class, task, device_map, trust)
