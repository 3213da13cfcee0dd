"""`python -m tools.report RUN [RUN ...]`."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path

from launcher.errors import ABSENT, EXIT_DONE, UserError
from launcher.picture import check_matplotlib
from tools.report.record import read_run
from tools.report.write import report_html, write_pngs


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(argv)
    try:
        check_matplotlib("fleetune report")
        out = options.out or options.runs[0] / "report.html"
        if out.suffix.lower() != ".html":
            raise UserError("--out", str(out), "is no page", "name a file that ends in .html")
        if out.is_dir() or not out.parent.is_dir():
            raise UserError("--out", ABSENT, f"{out} cannot be written", "name a file in a folder that exists")
        runs = [read_run(folder) for folder in options.runs]
        partial = out.with_name(f"{out.name}.tmp")
        partial.write_text(report_html(runs, datetime.now()), encoding="utf-8")
        partial.replace(out)
        written = [out, *(write_pngs(runs, options.png) if options.png else [])]
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write("".join(f"wrote {path}\n" for path in written))
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fleetune report", description="One page about one run, or several compared.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run: its spec's output_dir")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="default: report.html in the first run's folder")
    parser.add_argument("--png", type=Path, metavar="DIR", help="every picture as a file as well")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
