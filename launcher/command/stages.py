"""`fleetune launch` of a spec with stages: each is prepared, launched and converted, the next starts from its model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from launcher.errors import ABSENT, EXIT_DONE, UserError


def launch_stages(spec_path: Path, raw: dict[str, Any], names: list[str], overrides: list[str]) -> int:
    """Exit code of the first that failed, 0 when all are done. A stage whose model is there is not run again."""
    from launcher.job.stages import STAGE, model_folder
    from launcher.spawn import run_until_done

    root = str(raw.get("output_dir"))
    for name in names:
        model = Path(model_folder(root, name))
        if (model / "config.json").is_file():
            typer.echo(f"stage {name}: done, {model}")
            continue
        typer.echo(f"stage {name}: {root}/{name}")
        told = [word for override in [*overrides, f"{STAGE}={name}"] for word in ("--set", override)]
        for command in (["prepare"], ["launch"]):
            code = run_until_done([sys.executable, "-m", "launcher", *command, str(spec_path), *told], {})
            if code != EXIT_DONE:
                return code
        _convert(Path(root) / name, model)
    return EXIT_DONE


def _convert(run: Path, model: Path) -> None:
    """The whole model, adapters merged into it."""
    from tools.convert import convert
    from tools.formats.locate import has_adapter

    typer.echo(convert(str(run), f"hf:{model}", merge=has_adapter(run / "hf")).sentence())


def refuse_elsewhere(names: list[str]) -> UserError:
    rule = "has stages, which launch starts one after the other on this machine only"
    return UserError("stages", ABSENT, rule, f"launch each by itself: --set stage={names[0]}, then the next")
