"""Golden files: text compared whole, rewritten by `pytest --update-golden`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Golden:
    folder: Path
    update: bool

    def check(self, name: str, text: str) -> None:
        """Fail unless the golden file holds exactly this text."""
        path = self.folder / name
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing: write it with `pytest --update-golden`, and read it"
        assert text == path.read_text(encoding="utf-8"), (
            "differs; if that is right: `pytest --update-golden`, and read the diff"
        )
