"""Pictures drawn alike everywhere: a PNG, or SVG in a page that holds all it needs and follows the light or dark theme.

matplotlib is imported inside the functions: `pip install 'fleetune[plot]'` brings it, and nothing else needs it.
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from launcher.errors import ABSENT, UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Colour of text and axes, replaced by the page's own in HTML: no line or marker is drawn in it."""
GREY = "#808080"
"""Seen on white and on near-black: limits, grids, what is only a measure."""
LINES = ("#2f7ed8", "#e8710a", "#1a9850", "#c2185b", "#8e5bd0", "#8c6d31", "#00a3a3", "#d62728")
"""Readable on white and on near-black."""
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")


def check_matplotlib(option: str) -> None:
    """Before anything is computed. Raises `UserError` without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(option, ABSENT, "needs matplotlib", "pip install 'fleetune[plot]'") from None


@contextmanager
def drawing(width_inches: float, height_inches: float) -> Iterator[Figure]:
    """An empty figure in the common style, which holds for what is drawn inside the block."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = dict.fromkeys(_INKED, INK)
    style |= {"font.family": "sans-serif", "font.size": 12, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        yield Figure(figsize=(width_inches, height_inches), layout="constrained")


def grid(axes: Axes) -> None:
    axes.grid(axis="y", color=f"{GREY}40")
    axes.set_axisbelow(True)


def write_png(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=160, facecolor="white")


def svg(figure: Figure) -> str:
    """The `<svg>` element, in the page's ink; the same text for the same figure."""
    from matplotlib import rc_context

    drawn = io.StringIO()
    # text stays text, and ids and the date do not change from one run to the next
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fleetune"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    picture = drawn.getvalue()
    return picture[picture.index("<svg") :].replace(INK, "var(--ink)")  # without the XML declaration


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --faint: #80808040; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #14171a; } }
body { margin: 0 auto; max-width: 46rem; padding: 0.5rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.4 system-ui, sans-serif; }
svg { width: 100%; max-width: 38rem; height: auto; }
pre { overflow-x: auto; font-size: 0.8rem; }
$style</style>
</head>
<body>
$body
</body>
</html>
""")


def page(title: str, body: str, style: str = "") -> str:
    """A whole HTML page that fetches nothing and runs nothing. `body` and `style` are HTML and CSS, `title` is text."""
    return _PAGE.substitute(title=html.escape(title), body=body, style=style)
