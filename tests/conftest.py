"""Fixtures that several tests share. A session's cache of model costs is its own."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

import pytest

from tests.golden.compare import Golden
from tests.support import write_corpus

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# DeepSpeed's ops take minutes to compile and are nobody's secret: where torch keeps them, before a session's own cache.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
_BUILD = f"py{sys.version_info.major}{sys.version_info.minor}_cpu"
_OPS = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_CACHE / "torch_extensions" / _BUILD)))
_LONGEST_BUILD_SECONDS = 900
for _lock in _OPS.glob("*/lock"):  # a build that was killed leaves its lock, and torch waits for it without end
    with contextlib.suppress(OSError):
        if time.time() - _lock.stat().st_mtime > _LONGEST_BUILD_SECONDS:
            _lock.unlink()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew, then read their diff")


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(Path(__file__).parent / "golden", request.config.getoption("--update-golden"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Costs are measured by this session, not found from an earlier one that may have had a bug."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))
