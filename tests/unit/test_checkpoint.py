"""Which folder is a checkpoint, which is the newest, and which are removed: with folders made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.checksum import file_digest
from launcher.errors import CheckpointError
from launcher.train.checkpoint import _prune, _seal, check_same_layout, newest_complete
from launcher.train.manifest import MANIFEST, VERSION, Manifest, read_saved


def manifest(step: int = 1, **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "version": VERSION,
        "step": step,
        "strategy": "zero2",
        "engine": "deepspeed",
        "num_ranks": 2,
        "cursor": {"position": 8 * step},
        "plan_digest": "0123456789ab",
        "spec": {},
        "versions": {},
        "files": {},
    }
    return Manifest(**{**values, **changes})


def checkpoint(root: Path, step: int, **changes: Any) -> Path:
    """A complete one with two files, sealed as the trainer seals it."""
    partial, final = root / f"step-{step:08d}.tmp", root / f"step-{step:08d}"
    (partial / "zero").mkdir(parents=True)
    (partial / "zero" / "a.pt").write_bytes(b"weights" * step)
    (partial / "b.bin").write_bytes(b"")
    files = {
        name: {"size": (partial / name).stat().st_size, "blake2b": file_digest(partial / name)}
        for name in ("zero/a.pt", "b.bin")
    }
    _seal(partial, final, manifest(step, **changes), files)
    return final


def newest(root: Path) -> tuple[str | None, list[str]]:
    """(name of the newest, warnings)."""
    warnings: list[str] = []
    saved = newest_complete(root, warnings.append)
    return (saved.folder.name if saved else None), warnings


def test_a_sealed_folder_is_a_checkpoint(tmp_path: Path) -> None:
    """Its manifest comes back whole; the folder it was written in is gone."""
    folder = checkpoint(tmp_path, 20)
    saved = read_saved(folder)
    assert saved.manifest.step == 20
    assert set(saved.manifest.files) == {"zero/a.pt", "b.bin"}
    assert not any(saved.is_altered(name) for name in saved.manifest.files)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000020"]


def test_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    """A first start is no mistake."""
    assert newest(tmp_path / "nowhere") == (None, [])
    assert newest(tmp_path) == (None, [])


def test_the_newest_is_by_number(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        checkpoint(tmp_path, step)
    assert newest(tmp_path) == ("step-00000100", [])


def test_a_save_that_was_killed_is_passed_over(tmp_path: Path) -> None:
    """A `.tmp` folder, a stray file and somebody's own folder are not looked at."""
    checkpoint(tmp_path, 5)
    (tmp_path / "step-00000010.tmp" / "zero").mkdir(parents=True)
    (tmp_path / "step-00000010.tmp" / MANIFEST).write_text("{}")
    (tmp_path / "step-00000011").write_text("a file")
    (tmp_path / "step-best").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert newest(tmp_path)[0] == "step-00000005"


def damage_size(folder: Path) -> None:
    (folder / "zero" / "a.pt").write_bytes(b"cut")


def damage_missing(folder: Path) -> None:
    (folder / "zero" / "a.pt").unlink()


def damage_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def damage_json(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-9])


def damage_list(folder: Path) -> None:
    (folder / MANIFEST).write_text("[]")


def damage_keys(folder: Path) -> None:
    (folder / MANIFEST).write_text(json.dumps({"version": VERSION, "files": {}}))


def damage_empty_file_missing(folder: Path) -> None:
    """Its size is 0, as is that of a file which is not there."""
    (folder / "b.bin").unlink()


DAMAGES = [
    (damage_size, "has 3 bytes where the manifest says 14"),
    (damage_missing, "a.pt: is missing"),
    (damage_empty_file_missing, "b.bin: is missing"),
    (damage_manifest, "is incomplete: it has no manifest.json"),
    (damage_json, "is not a manifest of fleetune"),
    (damage_list, "is not a manifest of fleetune"),
    (damage_keys, "is not a manifest of fleetune"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_a_damaged_one_is_passed_over_with_a_warning(damage: Any, words: str, tmp_path: Path) -> None:
    """The run goes on from the one before."""
    checkpoint(tmp_path, 1)
    damage(checkpoint(tmp_path, 2))
    name, warnings = newest(tmp_path)
    assert name == "step-00000001"
    assert len(warnings) == 1
    assert words in warnings[0]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_where_all_are_damaged_nothing_is_started(damage: Any, words: str, tmp_path: Path) -> None:
    """A fresh start would in time overwrite what could still be repaired; the newest one's damage is told."""
    damage(checkpoint(tmp_path, 2))
    with pytest.raises(CheckpointError, match=words):
        newest(tmp_path)


def test_a_changed_byte_is_seen_by_the_checksum_only(tmp_path: Path) -> None:
    """Same size, other content: the folder opens, the file is known as altered."""
    folder = checkpoint(tmp_path, 2)
    path = folder / "zero" / "a.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"S")
    saved = read_saved(folder)
    assert [name for name in saved.manifest.files if saved.is_altered(name)] == ["zero/a.pt"]


def test_a_manifest_of_another_version_is_not_guessed(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 2, version=VERSION + 1)
    with pytest.raises(CheckpointError, match=r"2 is of a manifest version other than 1; open it with the fleetune"):
        read_saved(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_a_manifest_names_no_file_outside_its_folder(name: str, tmp_path: Path) -> None:
    """It may have been downloaded."""
    folder = checkpoint(tmp_path, 2)
    raw = json.loads((folder / MANIFEST).read_text())
    raw["files"][name] = {"size": 0, "blake2b": ""}
    (folder / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="names a file outside its own folder"):
        read_saved(folder)


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    """After going back to an earlier one."""
    checkpoint(tmp_path, 3, plan_digest="older")
    checkpoint(tmp_path, 3, plan_digest="newer")
    assert read_saved(tmp_path / "step-00000003").manifest.plan_digest == "newer"


@pytest.mark.parametrize(("keep_last", "left"), [(1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_are_kept(keep_last: int, left: list[int], tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint(tmp_path, step)
    _prune(tmp_path, keep_last)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in left]


def test_only_checkpoints_are_removed(tmp_path: Path) -> None:
    """A folder without a manifest is not ours to delete: it may hold what a person put there."""
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    damage_manifest(tmp_path / "step-00000001")
    (tmp_path / "step-best").mkdir()
    _prune(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003", "step-best"]


@pytest.mark.parametrize(
    ("saved_by", "resumed_by", "works"),
    [
        (("zero2", "deepspeed", 2), ("zero2", "deepspeed", 2), True),
        (("zero2", "deepspeed", 2), ("zero2", "deepspeed", 4), False),
        (("zero2", "deepspeed", 2), ("zero3", "deepspeed", 2), False),
        (("zero2", "deepspeed", 2), ("fsdp", "torch", 2), False),
        (("fsdp", "torch", 2), ("fsdp", "torch", 8), True),
        (("fsdp", "torch", 2), ("ddp", "torch", 1), True),
        (("ddp", "torch", 1), ("zero1", "deepspeed", 1), False),
    ],
)
def test_which_layout_resumes_which(saved_by: Any, resumed_by: Any, works: bool, tmp_path: Path) -> None:
    """torch's folders under any torch layout; DeepSpeed's under the stage and ranks that wrote them."""
    strategy, engine, num_ranks = saved_by
    saved = read_saved(checkpoint(tmp_path, 1, strategy=strategy, engine=engine, num_ranks=num_ranks))
    if works:
        check_same_layout(saved, *resumed_by)
        return
    words = rf"was saved by {strategy} on {num_ranks} ranks and cannot be resumed by {resumed_by[0]} on {resumed_by[2]}"
    with pytest.raises(CheckpointError, match=words):
        check_same_layout(saved, *resumed_by)
