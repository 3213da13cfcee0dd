"""Training speed: ours beside transformers' Trainer, an accelerate loop and a bare PyTorch loop, one after the other.

Same model, rows, global batches, steps of AdamW, precision and cores. Three cases: blocks of equal length, where there is
nothing to gain; and sentences and conversations of uneven length, where ours sorts each global batch by length.
Rates are valid tokens (padding left out) per second over the steps behind the warm-up, data included; the losses of all steps
are compared with the bare loop's. Wants FLEETUNE_TEST_DATA, the folder of real weights and sets.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from launcher.data.prepare import prepare
from launcher.data.prepared import open_prepared
from launcher.errors import ABSENT, DataError
from launcher.job import JobSpec, parse_spec
from launcher.spawn import run_ranks
from launcher.task import task_of

WARM_UP = 3
"""Steps that are not timed: the first of a process are slower."""
SEED = 5


class Lesson(NamedTuple):
    task: dict[str, Any]
    model: str
    """Folder under `weights/`."""
    source: str
    seq_len: int
    batch: int
    micro_batch: int
    steps: int
    by_length: bool = True


LESSONS = {
    "wikitext": Lesson({"name": "causal_lm"}, "stories15M", "lm/wikitext-2-raw/valid.txt.gz", 128, 8, 8, 13, False),
    "sst2": Lesson({"name": "sequence_classification"}, "minilm-l6-h384", "cls/sst2/train.tsv", 128, 64, 16, 13),
    "alpaca": Lesson({"name": "chat"}, "minimind2-small", "instr/llamafactory_demo/alpaca_en_demo.json", 512, 32, 4, 9),
}
CONTENDERS = ("bare", "accelerate", "trainer")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench train", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--case", choices=LESSONS, nargs="+", default=list(LESSONS), help="default: all")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="threads of each (default: %(default)s)")
    options = parser.parse_args(argv)
    data = Path(os.environ.get("FLEETUNE_TEST_DATA", "/nowhere"))
    if not (data / "weights").is_dir():
        rule = "names no folder with real weights and sets"
        raise DataError("FLEETUNE_TEST_DATA", ABSENT, rule, "set it to one")
    environment = {"OMP_NUM_THREADS": str(options.cores), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in options.case:
        with tempfile.TemporaryDirectory() as folder:
            results = _results(LESSONS[name], data, Path(folder), environment)
        sys.stdout.write(_table(name, LESSONS[name], results) + "\n")
        sys.stdout.flush()
    return 0


def _results(lesson: Lesson, data: Path, folder: Path, environment: dict[str, str]) -> dict[str, dict[str, Any]]:
    spec = _spec(lesson, data, folder)
    prepare(spec)
    prepared = open_prepared(spec)
    case = {
        "prepared": spec.prepared_dir,
        "model": spec.model.path,
        "auto_class": task_of(spec, prepared.facts(spec.task)).auto_class,
        "pad_id": prepared.pad_id,
        "batch": lesson.batch,
        "steps": lesson.steps,
        "lr": spec.training.lr,
        "seed": SEED,
        "scratch": str(folder / "scratch"),
    }
    (folder / "case.json").write_text(json.dumps(case))
    results = {peer: _peer(peer, folder / "case.json", environment) for peer in CONTENDERS}
    return {"fleetune": _ours(spec, folder, results["bare"]["tokens"], environment), **results}


def _spec(lesson: Lesson, data: Path, folder: Path) -> JobSpec:
    labelled = lesson.task["name"] == "sequence_classification"
    return parse_spec(
        {
            "output_dir": str(folder / "run"),
            "model": {"path": _still(data / "weights" / lesson.model, folder / "model")},
            "task": lesson.task,
            "data": {
                "train": _labelled(data / lesson.source, folder) if labelled else str(data / lesson.source),
                "batching": "by_length" if lesson.by_length else "in_turns",
                **({"sample_by": "paragraph"} if lesson.source.endswith(".txt.gz") else {}),
            },
            "training": {
                "seq_len": lesson.seq_len,
                "global_batch_size": lesson.batch,
                "max_steps": lesson.steps,
                "lr": 5e-5,
                "schedule": "constant",
            },
            "parallel": {"strategy": "ddp", "micro_batch_size": lesson.micro_batch, "recompute": "none"},
            "cluster": {"name": "cpu", "gpus_per_node": 1},
            "tracking": {"log_every_steps": 1},
            "seed": SEED,
        }
    )


def _still(weights: Path, folder: Path) -> str:
    """The model without dropout, so that losses can be compared."""
    folder.mkdir()
    for file in weights.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((weights / "config.json").read_text())
    off = {key: 0.0 for key in config if "dropout" in key and isinstance(config[key], int | float)}
    (folder / "config.json").write_text(json.dumps({**config, **off}))
    return str(folder)


def _labelled(source: Path, folder: Path) -> str:
    """`sentence <tab> 0/1` lines as records."""
    path = folder / "rows.jsonl"
    with source.open() as lines, path.open("w") as out:
        for line in islice(lines, 4000):
            text, _, label = line.rstrip("\n").rpartition("\t")
            out.write(json.dumps({"text": text, "label": label}) + "\n")
    return str(path)


def _peer(peer: str, case: Path, environment: dict[str, str]) -> dict[str, Any]:
    lines: list[str] = []
    code = run_ranks("tools.bench._train_peers", 1, [peer, str(case)], environment, lines.append)
    found = [line for line in lines if line.startswith('{"losses"')]
    if code or not found:
        raise DataError("peer", peer, f"did not run: {_last(lines)}", "see what it wrote")
    return dict(json.loads(found[0]))


def _ours(spec: JobSpec, folder: Path, tokens: list[int], environment: dict[str, str]) -> dict[str, Any]:
    """A run as any other; its steps are timed from record to record, what is between them included."""
    path = folder / "job.json"
    path.write_text(spec.model_dump_json(exclude_defaults=True))
    lines: list[str] = []
    ends: list[float] = []

    def hear(line: str) -> None:
        lines.append(line)

    code = run_ranks("launcher.run", 1, ["--spec", str(path)], environment, hear)
    if code:
        raise DataError("fleetune", ABSENT, f"did not run: {_last(lines)}", "see what it wrote")
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    del ends
    return {
        "losses": [step["loss"] for step in steps],
        "seconds": [step["seconds"] for step in steps[1:]],
        "tokens": tokens,
    }


def _last(lines: list[str]) -> str:
    return next((line for line in reversed(lines) if "Error" in line), (lines or ["no word"])[-1])


def _table(name: str, lesson: Lesson, results: dict[str, dict[str, Any]]) -> str:
    rates = {who: _rate(result) for who, result in results.items()}
    reference = results["bare"]["losses"]
    lines = [
        f"{name}: {lesson.model}, batch {lesson.batch}, seq_len {lesson.seq_len}, {lesson.steps} steps, fp32, 1 process",
        f"{'':<12} {'valid tokens/s':>14} {'of bare':>8} {'of Trainer':>10} {'first loss':>11} {'last loss':>10} {'worst apart':>12}",
    ]
    for who, result in results.items():
        losses = result["losses"]
        apart = max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))
        of = f"{rates[who] / rates['bare']:>8.2f} {rates[who] / rates['trainer']:>10.2f}"
        lines.append(f"{who:<12} {rates[who]:>14.0f} {of} {losses[0]:>11.4f} {losses[-1]:>10.4f} {apart:>12.1e}")
    return "\n".join(lines)


def _rate(result: dict[str, Any]) -> float:
    """`seconds[i]` is the time of step i + 1."""
    return float(sum(result["tokens"][WARM_UP + 1 :]) / sum(result["seconds"][WARM_UP:]))
