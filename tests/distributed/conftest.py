"""Checkpoints that several tests read: written once by real ranks, since DeepSpeed needs half a minute to start."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import run_ranks, torchrun


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What convert_ranks.py says: plain DeepSpeed and FSDP2 scripts, two ranks, one step, and the truth."""
    out = tmp_path_factory.mktemp("saved") / "all"
    log = out.with_suffix(".log")
    code = run_ranks(torchrun(2, Path(__file__).with_name("convert_ranks.py"), out), log)
    assert code == 0, log.read_text()[-4000:]
    return out
