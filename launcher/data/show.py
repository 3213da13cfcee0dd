"""What is in a prepared folder, for people: counts, lengths, and samples with the tokens that are learnt from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.data.mapped import PreparedSplit
from launcher.data.prepared import PreparedData
from launcher.errors import DataError
from launcher.task import IGNORED, Row

if TYPE_CHECKING:
    from rich.text import Text

_BARS = 12
"""Bars of a histogram: as many as are told apart at a glance."""


@dataclass(frozen=True)
class SplitStatistics:
    """Lengths are in tokens per sample."""

    num_records: int
    num_samples: int
    num_tokens: int
    num_shards: int
    num_bytes: int
    shortest: int
    median: float
    mean: float
    longest: int
    edges: tuple[int, ...]
    """Bar i of the histogram counts the lengths from edges[i] up to, and without, edges[i + 1]."""
    counts: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def statistics(data: PreparedData, name: str) -> SplitStatistics:
    split = data.split(name)
    lengths = split.lengths()
    edges = _edges(int(lengths.min()), int(lengths.max()))
    counts, _ = np.histogram(lengths, bins=edges)
    return SplitStatistics(
        num_records=int(split.entry["num_records"]),
        num_samples=len(split),
        num_tokens=split.num_tokens,
        num_shards=len(split.entry["shards"]),
        num_bytes=sum(shard["size"] for shard in split.entry["shards"]),
        shortest=int(lengths.min()),
        median=float(np.median(lengths)),
        mean=float(lengths.mean()),
        longest=int(lengths.max()),
        edges=tuple(edges),
        counts=tuple(counts.tolist()),
    )


def _edges(shortest: int, longest: int) -> list[int]:
    """Whole numbers, evenly spaced; the last is above the longest."""
    width = max(1, -(-(longest - shortest + 1) // _BARS))
    return list(range(shortest, longest + width + 1, width))


@dataclass(frozen=True)
class ShownSample:
    """One sample, token by token: the piece of text it stands for, and whether it is a target of the loss."""

    number: int
    pieces: tuple[str, ...]
    is_target: tuple[bool, ...]
    others: dict[str, Any]
    """What else the row holds: a label, a number."""


def shown_sample(split: PreparedSplit, number: int, tokenizer: Any, task: Any, pad_id: int) -> ShownSample:
    """`task` tells the targets as it does in training: from the batch of this one sample."""
    if not 0 <= number < len(split):
        raise DataError("--sample", number, f"is not a sample: there are {len(split)}", f"give 0 to {len(split) - 1}")
    (row,) = split.rows(np.array([number]))
    ids = [int(token) for token in row["input_ids"]]
    others = {name: _plain(value) for name, value in row.items() if name not in ("input_ids", "sample")}
    return ShownSample(number, tuple(_pieces(ids, tokenizer)), _targets(row, len(ids), task, pad_id), others)


def _pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text of those before it; half a character shows with the token that ends it."""
    pieces = []
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[max(0, end - 8) : end])
        before = tokenizer.decode(ids[max(0, end - 8) : end - 1]) if end > 1 else ""
        common = text[len(before) :] if text.startswith(before) else text
        pieces.append("" if common.endswith("\ufffd") else common)
    return pieces


def _targets(row: Row, num_tokens: int, task: Any, pad_id: int) -> tuple[bool, ...]:
    """One flag per token where the task's labels stand at tokens, none where it learns from the sample as a whole."""
    labels = task.collate([{**row, "epoch": 0}], pad_id).get("labels")
    if labels is None or labels.ndim != 2 or labels.shape != (1, num_tokens):
        return ()
    return tuple((labels[0] != IGNORED).tolist())


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def styled(sample: ShownSample) -> Text:
    """The text with its targets in green and the rest dim, as rich draws it."""
    from rich.text import Text

    text = Text()
    flags = sample.is_target or (False,) * len(sample.pieces)
    for piece, is_target in zip(sample.pieces, flags, strict=True):
        text.append(piece, style="green" if is_target else "dim")
    return text


def bracketed(sample: ShownSample) -> str:
    """For a pipe: runs of targets between double brackets."""
    if not sample.is_target:
        return "".join(sample.pieces)
    parts, is_open = [], False
    for piece, is_target in zip(sample.pieces, sample.is_target, strict=True):
        if is_target != is_open:
            parts.append("[[" if is_target else "]]")
            is_open = is_target
        parts.append(piece)
    return "".join([*parts, "]]" if is_open else ""])


def draw(path: Path, found: dict[str, SplitStatistics]) -> None:
    """The histograms as a picture, by the suffix of `path`: png, svg, pdf, or html with the picture inside."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        way_out = "pip install 'fleetune[plot]'"
        raise DataError("--plot", str(path), "needs the package matplotlib", way_out) from None
    if path.suffix not in (".png", ".svg", ".pdf", ".html"):
        raise DataError("--plot", str(path), "has a suffix of no picture", "give a .png, .svg, .pdf or .html file")
    figure = Figure(figsize=(6.4, 2.4 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), squeeze=False)[:, 0]
    for axis, (name, told) in zip(axes, found.items(), strict=True):
        axis.bar(told.edges[:-1], told.counts, width=np.diff(told.edges), align="edge", edgecolor="white")
        axis.set(title=f"{name}: {told.num_samples:,} samples", xlabel="tokens per sample", ylabel="samples")
    if path.suffix == ".html":
        path.write_text(_page(figure), encoding="utf-8")
    else:
        figure.savefig(path)


def _page(figure: Any) -> str:
    import io

    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    svg = picture.getvalue()
    return f"<!doctype html><title>prepared data</title>\n{svg[svg.index('<svg') :]}"
