"""What a login node loads: planning, help and a plan of a known model need no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPO, job
from tests.unit.costs import small_cost

HEAVY = ("torch", "transformers", "deepspeed", "numpy")
REPORT = f"import sys; print(); print([name for name in {HEAVY} if name in sys.modules])"


def heavy_after(body: str, **environment: str) -> str:
    """The heavy packages that a fresh interpreter holds after `body`, as its last line of output."""
    done = subprocess.run(
        [sys.executable, "-c", f"{body}\n{REPORT}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPO), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def command(*argv: str) -> str:
    """The command line, in this process, with the end of the process taken out."""
    return f"import launcher.cli\ntry:\n    launcher.cli.main({list(argv)!r})\nexcept SystemExit as left:\n    assert left.code == 0"


@pytest.mark.parametrize(
    "body",
    [
        "import launcher.plan, launcher.emit",
        "import launcher.plan.explain, launcher.cost.cache, launcher.job.cluster",
        "import launcher.cli",
        command("--help"),
        command("schema"),
    ],
)
def test_deciding_and_helping_load_nothing_heavy(body: str) -> None:
    assert heavy_after(body) == "[]"


def test_the_plan_of_a_measured_model_loads_nothing_heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the spec to the text on the screen and the files of `--emit`."""
    from launcher.cost.cache import cache_path
    from launcher.job import load_spec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec_path = tmp_path / "job.yaml"  # JSON is YAML
    spec_path.write_text(json.dumps(job(tmp_path / "run", tmp_path / "corpus.jsonl", "gpt")))
    cached = cache_path(load_spec(spec_path))
    cached.parent.mkdir(parents=True)
    cached.write_text(json.dumps(small_cost().to_json()))
    body = command("plan", str(spec_path), "--set", "parallel=zero2", "--emit", str(tmp_path / "files"))
    assert heavy_after(body) == "[]"
    assert (tmp_path / "files" / "deepspeed.json").is_file()


def test_a_rank_of_torch_loads_no_other_engine_and_no_adapters() -> None:
    """Seconds of every start: DeepSpeed is for its own strategies, peft for adapters, accelerate for nobody."""
    body = "import sys, launcher.run, launcher.train.loop, launcher.train.torch_engine\n"
    body += "print([name for name in ('deepspeed', 'peft', 'accelerate') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=False, cwd=REPO)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_check_sees_what_is_heavy() -> None:
    assert heavy_after("import numpy") == "['numpy']"
