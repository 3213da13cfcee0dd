"""Evaluation beside lm-evaluation-harness: the same questions, the same model, one process, each in turn.

    python -m tools.bench evaluate --model DIR --arc arc_easy.jsonl --lambada lambada.jsonl

Both sides read, tokenise, score and average; what is timed is that, without imports and loading. The harness runs its own
`hf` model at two batch sizes and is given its best. Then memory: two processes of ours, one with four times
the examples of the other.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from launcher.errors import ABSENT, UserError
from launcher.spawn import run_captured

BATCH_SIZES = (8, 32)
ROUNDS = 3
_YAML = {
    "arc": """\
task: arc_here
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
    "lambada": """\
task: lambada_here
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{' '+continuation}}}}"
metric_list: [{{metric: acc}}, {{metric: perplexity, aggregation: perplexity}}]
""",
}
_OURS = {
    "arc": ["--task", "multiple_choice", "--prompt", "{query}\\nAnswer:"],
    "lambada": ["--task", "cloze"],
}
_SAME = {
    "arc": (("accuracy", "acc"), ("accuracy_norm", "acc_norm")),
    "lambada": (("accuracy", "acc"), ("perplexity", "perplexity")),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench evaluate", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--arc", type=Path, required=True, help="jsonl of query, choices, gold")
    parser.add_argument("--lambada", type=Path, required=True, help="jsonl of context, continuation")
    parser.add_argument("--limit", type=int, default=120, help="examples of each (default: %(default)s)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: _first(getattr(options, name), Path(folder) / f"{name}.jsonl", options.limit) for name in _OURS}
        theirs = _harness(options.model, Path(folder), files)
        for name, file in files.items():
            _race(name, theirs[name], _ours(options.model, file, _OURS[name]))
    _memory(options)
    return 0


def _first(source: Path, target: Path, number: int) -> Path:
    try:
        with source.open(encoding="utf-8") as lines:
            target.write_text("".join(islice(lines, number)), encoding="utf-8")
    except OSError as error:
        raise UserError(
            "--arc and --lambada", str(source), f"cannot be read ({error.strerror})", "give files"
        ) from None
    return target


Run = Callable[[], dict[str, float]]


def _ours(model: Path, file: Path, words: list[str]) -> Run:
    from launcher.train.world import World
    from tools.evaluate import Door, _parser

    options = _parser().parse_args([str(model), "--data", str(file), *words, "--resamples", "1"])

    def run() -> dict[str, float]:
        results = Door(options, World("python", 0, 0, 1, 1)).run()
        assert results is not None
        return {"seconds": results.seconds, **{name: score.value for name, score in results.scores.items()}}

    return run


def _harness(model: Path, folder: Path, files: dict[str, Path]) -> dict[str, dict[int, Run]]:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("evaluate", ABSENT, "needs the peer", "pip install 'fleetune[eval]'") from None
    logging.disable(logging.WARNING)
    for name, file in files.items():
        (folder / f"{name}.yaml").write_text(_YAML[name].format(file=json.dumps(str(file))), encoding="utf-8")
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def of(name: str, adapter: Any) -> Run:
        def run() -> dict[str, float]:
            began = time.perf_counter()
            found = simple_evaluate(
                model=adapter, tasks=[f"{name}_here"], task_manager=manager, bootstrap_iters=0, log_samples=False
            )
            seconds = time.perf_counter() - began
            assert found is not None
            row = found["results"][f"{name}_here"]
            return {"seconds": seconds, **{key.partition(",")[0]: row[key] for key in row if key.endswith(",none")}}

        return run

    adapters = {
        size: HFLM(pretrained=str(model), batch_size=size, device="cpu", dtype="float32") for size in BATCH_SIZES
    }
    return {name: {size: of(name, adapter) for size, adapter in adapters.items()} for name in files}


def _race(name: str, theirs: dict[int, Run], ours: Run) -> None:
    """Rounds in turns, after one of each that warms up; the median of each."""
    runs: dict[str, Run] = {"fleetune": ours, **{f"hf, batch {size}": run for size, run in theirs.items()}}
    found = {who: [run() for _ in range(1)] for who, run in runs.items()}
    for _ in range(ROUNDS):
        for who, run in runs.items():
            found[who].append(run())
    seconds = {who: sorted(one["seconds"] for one in every[1:])[ROUNDS // 2] for who, every in found.items()}
    best = min(value for who, value in seconds.items() if who != "fleetune")
    for who, value in seconds.items():
        scores = found[who][-1]
        shown = [f"{pair[who != 'fleetune']} {scores[pair[who != 'fleetune']]:.6g}" for pair in _SAME[name]]
        sys.stdout.write(
            f"{name:<8} {who:<14} {value:8.3f} s   {value / seconds['fleetune']:5.2f}x   {', '.join(shown)}\n"
        )
    sys.stdout.write(f"{name:<8} at its best the harness takes {best / seconds['fleetune']:.2f} times as long\n")


def _memory(options: argparse.Namespace) -> None:
    peaks = []
    for limit in (options.limit, 4 * options.limit):
        words = [sys.executable, "-m", "tools.evaluate", str(options.model), "--data", str(options.lambada)]
        done = run_captured([*words, *_OURS["lambada"], "--limit", str(limit), "--max-batch-tokens", "2048"])
        if done.returncode:
            raise UserError("evaluate", ABSENT, "a process of ours failed", done.stderr.strip().splitlines()[-1])
        peaks.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
    sys.stdout.write(
        f"memory   peak {peaks[0]:.0f} MiB for {options.limit} examples, {peaks[1]:.0f} MiB for four times as many\n"
    )
