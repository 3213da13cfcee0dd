"""Which folder is a checkpoint, which is the newest, and which are removed: with folders made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.checksum import file_digest
from launcher.errors import CheckpointError
from launcher.job.spec import CheckpointSection
from launcher.train.checkpoint import LATEST, newest_complete, prune, restore_interrupted, seal
from launcher.train.keep import in_use, kept
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
    seal(partial, final, manifest(step, **changes), files)
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
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "step-00000020"]
    assert (tmp_path / LATEST).read_text() == "step-00000020"


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
    prune(tmp_path, CheckpointSection(keep_last=keep_last))
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST] + [f"step-{step:08d}" for step in left]


def test_only_checkpoints_are_removed(tmp_path: Path) -> None:
    """A folder without a manifest is not ours to delete: it may hold what a person put there."""
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    damage_manifest(tmp_path / "step-00000001")
    (tmp_path / "step-best").mkdir()
    prune(tmp_path, CheckpointSection(keep_last=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "step-00000001", "step-00000003", "step-best"]


RULES = [
    ({"keep_last": 1}, {8}),
    ({"keep_last": 3}, {6, 7, 8}),
    ({"keep_last": 1, "keep_every": 3}, {3, 6, 8}),
    ({"keep_last": 1, "keep_best": 1}, {4, 8}),
    ({"keep_last": 1, "keep_best": 2}, {2, 4, 8}),
    ({"keep_last": 1, "keep_every": 4, "keep_best": 3}, {2, 4, 6, 8}),
    ({"keep_last": 9, "keep_best": 9}, set(range(1, 9))),
]


@pytest.mark.parametrize(("rule", "stay"), RULES)
def test_which_stay(rule: dict[str, int], stay: set[int]) -> None:
    """The last k, every n-th, the best by score; of equal scores the earlier."""
    scores: dict[int, float | None] = dict.fromkeys(range(1, 9))
    scores |= {2: 0.5, 4: 0.9, 6: 0.5, 8: 0.1}
    section = CheckpointSection.model_validate(rule)
    assert kept(scores, section) == stay
    turned = {step: None if score is None else -score for step, score in scores.items()}
    assert kept(turned, section, greater_is_better=False) == stay


def test_the_score_decides_on_disk_too(tmp_path: Path) -> None:
    for step, score in ((1, 0.2), (2, 0.8), (3, None), (4, 0.3)):
        checkpoint(tmp_path, step, score=score)
    prune(tmp_path, CheckpointSection(keep_last=1, keep_best=1))
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000002", "step-00000004"]


def test_one_that_is_read_is_not_taken_away(tmp_path: Path) -> None:
    """It goes with the next deletion after its readers have gone; a second reader is no hindrance."""
    rule = CheckpointSection(keep_last=1)
    for step in (1, 2):
        checkpoint(tmp_path, step)
    old = tmp_path / "step-00000001"
    with in_use(old), in_use(old):
        prune(tmp_path, rule)
        assert read_saved(old).manifest.step == 1
    prune(tmp_path, rule)
    assert not old.exists()


def test_a_replacement_cut_in_the_middle_is_undone(tmp_path: Path) -> None:
    """Between the two renames the checkpoint has another name; after both, what it replaced is left over."""
    folder = checkpoint(tmp_path, 3, plan_digest="older")
    folder.rename(folder.with_suffix(".old"))
    restore_interrupted(tmp_path)
    assert read_saved(folder).manifest.plan_digest == "older"
    checkpoint(tmp_path, 4).rename(tmp_path / "step-00000003.old")
    restore_interrupted(tmp_path)
    assert read_saved(folder).manifest.plan_digest == "older"
    assert not (tmp_path / "step-00000003.old").exists()
