"""`fleetune prepare` against `datasets.map(batched=True, num_proc=N)`: the same texts, the same tokenizer, in one run.

    python -m tools.bench prepare --tokenizer tokenizers/gpt2 --data wikitext-2/train.txt.gz
    python -m tools.bench prepare --tokenizer tokenizers/gpt2 --megabytes 1000

Each runs in a process of its own. Its time is that of the work, without imports; for fleetune from the first checksum
of the input to the last of the shards, for datasets of `map` alone, its files in its cache. The peak is of the resident
memory of the process and all its children together, looked at every 50 ms.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from launcher.spawn import start_python
from launcher.units import MIB, show_bytes, show_time

_LOOK_SECONDS = 0.05
_WORDS = 50_000
"""Different words of the synthetic corpus: Zipf's law over as many as a large English dictionary is used with."""


class Measured(NamedTuple):
    seconds: float
    peak_bytes: int
    num_tokens: int


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "corpus.txt"
        if options.data is not None:
            opened = gzip.open if options.data.suffix == ".gz" else open
            with opened(options.data, "rt", encoding="utf-8") as source:
                path.write_text(source.read(), encoding="utf-8")
        else:
            _write_synthetic(path, options.megabytes)
        asked = {"path": str(path), "folder": folder, "tokenizer": str(options.tokenizer), "workers": options.workers}
        found = {name: _measure({**asked, "name": name}) for name in CONTESTANTS}
        _print(found, path.stat().st_size, options.workers)
    return 0


def _print(found: dict[str, Measured], num_bytes: int, workers: int) -> None:
    base = found["datasets"].seconds
    lines = [f"{show_bytes(num_bytes)} of text, {workers} processes each", ""]
    lines.append(f"{'':<24}{'time':>10}{'MiB/s':>8}{'peak memory':>14}{'tokens':>14}{'speed':>8}")
    for name, (seconds, peak, num_tokens) in found.items():
        rate = num_bytes / MIB / seconds
        shown = f"{show_time(seconds):>10}{rate:>8.2f}{show_bytes(peak):>14}{num_tokens:>14,}{base / seconds:>7.2f}x"
        lines.append(f"{LABELS[name]:<24}{shown}")
    sys.stdout.write("\n".join(lines) + "\n")


def _measure(asked: dict[str, Any]) -> Measured:
    child = start_python(__name__, {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"})
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps(asked).encode())
    child.stdin.close()
    process, peak = psutil.Process(child.pid), 0
    while child.poll() is None:
        peak = max(peak, _resident(process))
        time.sleep(_LOOK_SECONDS)
    told = child.stdout.read().decode().splitlines()
    if child.returncode != 0 or not told:
        raise SystemExit(f"{asked['name']} ended with code {child.returncode}; see above")
    answer = json.loads(told[-1])
    return Measured(answer["seconds"], peak, answer["num_tokens"])


def _resident(process: psutil.Process) -> int:
    try:
        return sum(_own(one) for one in [process, *process.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0


def _own(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _write_synthetic(path: Path, num_megabytes: int) -> None:
    """Lines of 20 to 200 words drawn by Zipf's law, the words themselves of random letters; always the same."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = np.array(["".join(rng.choice(letters, size=int(n))) for n in rng.integers(2, 11, size=_WORDS)])
    shares = 1 / np.arange(1, _WORDS + 1)
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < num_megabytes * 1_000_000:
            drawn = words[rng.choice(_WORDS, size=200_000, p=shares / shares.sum())]
            for line in _cut(drawn, rng):
                written += file.write(line)


def _cut(words: Any, rng: np.random.Generator) -> Iterator[str]:
    at = 0
    while at < len(words):
        length = int(rng.integers(20, 200))
        yield " ".join(words[at : at + length]) + "\n"
        at += length


def _by_fleetune(asked: dict[str, Any]) -> tuple[float, int]:
    from launcher.data.prepare import prepare
    from launcher.job.load import parse_spec

    spec = parse_spec(
        {
            "output_dir": f"{asked['folder']}/run",
            "model": {"from_config": {"model_type": "gpt2"}},
            "task": "causal_lm",
            "data": {
                "train": asked["path"],
                "sample_by": "line",
                "validation_fraction": 0,
                "tokenizer": asked["tokenizer"],
                "packing": "none",
            },
            "training": {"seq_len": 1_000_000, "global_batch_size": 1, "max_steps": 1},
        }
    )
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(asked["tokenizer"])  # the other has imported all that this takes, and more

    started = time.perf_counter()
    index = prepare(spec, num_workers=asked["workers"]).index
    train = index["splits"]["train"]
    return time.perf_counter() - started, train["num_tokens"] - train["num_samples"]  # without the ends of text


def _by_datasets(asked: dict[str, Any]) -> tuple[float, int]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(asked["tokenizer"])
    table = datasets.load_dataset("text", data_files=asked["path"], cache_dir=f"{asked['folder']}/cache")["train"]

    def encoded(batch: dict[str, Any]) -> Any:
        return tokenizer(batch["text"])

    started = time.perf_counter()
    mapped = table.map(encoded, batched=True, num_proc=asked["workers"], remove_columns=["text"])
    seconds = time.perf_counter() - started
    lengths = (batch.column("input_ids").flatten() for batch in mapped.data.to_batches())
    return seconds, sum(map(len, lengths))


CONTESTANTS = {"datasets": _by_datasets, "fleetune": _by_fleetune}
LABELS = {"datasets": "datasets.map", "fleetune": "fleetune prepare"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.bench prepare", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a fast tokenizer")
    parser.add_argument(
        "--data", type=Path, help="text file, also .gz, a record per line; left out, a synthetic corpus"
    )
    parser.add_argument("--megabytes", type=int, default=50, help="size of the synthetic corpus (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of each (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where temporary files go")
    return parser


def _contestant() -> None:
    asked = json.load(sys.stdin)
    seconds, num_tokens = CONTESTANTS[asked["name"]](asked)
    sys.stdout.write(json.dumps({"seconds": seconds, "num_tokens": num_tokens}) + "\n")


if __name__ == "__main__":
    _contestant()
