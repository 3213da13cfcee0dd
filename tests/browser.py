"""A real headless Chromium, and what a page fetches."""

from __future__ import annotations

import functools
import html.parser
import os
import shutil
import subprocess
from pathlib import Path

import pytest

QUIET = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update")


class Outside(html.parser.HTMLParser):
    """Gathers what a page would fetch, and its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "script":
            self.fetched.append("<script>")
        self.fetched += [
            value or "" for key, value in attrs if key in ("src", "href", "xlink:href") and (value or "")[:1] != "#"
        ]


def fetched_by(page: str) -> list[str]:
    outside = Outside()
    outside.feed(page)
    return outside.fetched


@functools.cache
def chromium() -> str:
    """Its path; fetched from Debian's packages by root, skipped with the reason where it cannot be had."""
    for name in ("chromium", "chromium-browser"):
        if found := shutil.which(name):
            return found
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("chromium is not installed, and only root on Debian can install it")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "--yes", "--no-install-recommends", "chromium", "fonts-dejavu-core"]):
        done = subprocess.run(
            ["apt-get", "-qq", *words], env=environment, capture_output=True, check=False, timeout=600
        )
        if done.returncode != 0:
            pytest.skip(f"chromium is not installed, and apt-get cannot fetch it: {done.stderr.decode()[-200:]}")
    return shutil.which("chromium") or pytest.skip("Debian's chromium is not on the PATH")


def drawn(page: Path, picture: Path, width: int = 400, height: int = 900, dark: bool = False) -> float:
    """Take a screenshot of a page at this size; returns how much its shades differ, 0 for a blank one."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *QUIET]
    options += [f"--window-size={width},{height}", f"--screenshot={picture}"]
    options += [f"--user-data-dir={picture.with_suffix('.profile')}"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run([chromium(), *options, page.as_uri()], capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    from matplotlib.image import imread

    return float(imread(picture)[:, :, :3].std())


def mean_shade(picture: Path) -> float:
    """0 black, 1 white."""
    from matplotlib.image import imread

    return float(imread(picture)[:, :, :3].mean())
