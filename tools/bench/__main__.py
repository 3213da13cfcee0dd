"""`python -m tools.bench NAME ...`: NAME is a file of this folder, and its `main(argv)` takes the rest."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from launcher.errors import UserError

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def main(argv: list[str] | None = None) -> int:
    """Returns the benchmark's exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description="Run one benchmark.")
    parser.add_argument("name", choices=NAMES, help="which")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="its own options; --help tells them")
    options = parser.parse_args(argv)
    try:
        return int(importlib.import_module(f"tools.bench.{options.name}").main(options.rest))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
