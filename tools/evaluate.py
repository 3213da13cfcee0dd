"""Says how good a model is, how sure that is, and whether it beats another; also `fleetune eval`.

    python -m tools.evaluate out --task causal_lm --data book.txt --json
    python -m tools.evaluate runs/a --task multiple_choice --data arc.jsonl --against base --out scores
    torchrun --nproc-per-node 8 -m tools.evaluate out --task perplexity --data 'books/*.txt'

MODEL is a folder of transformers or peft, a run of fleetune or a step of it, or a ZeRO or DCP checkpoint. This file is the
door: options, ranks and files; what is asked and how is in `tools/evaluation/`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from launcher.data.prepared import PreparedData
from launcher.errors import EXIT_DONE, DataError, UserError
from launcher.task import Row, Task
from launcher.train.agree import decide_on_first
from launcher.train.world import World
from tools.evaluation.asked import TASKS, Asked, asked, auto_class, check_options, question_digest
from tools.evaluation.batches import Budget
from tools.evaluation.calibration import draw_reliability, reliability
from tools.evaluation.compare import check_same, differences, mcnemar
from tools.evaluation.fields import Fields
from tools.evaluation.harness import harness_scores
from tools.evaluation.intervals import RESAMPLES, intervals, point
from tools.evaluation.learnt import Learnt, held_out_rows, of_rows
from tools.evaluation.opened import Opened, Place, find, opened
from tools.evaluation.results import Results, saved, table_of, write_results
from tools.evaluation.scoring import Found, ask, check_not_empty, merged, remove, tabulated, wait_for_all
from tools.evaluation.slices import sliced
from tools.evaluation.spool import Spool, read_predictions
from tools.evaluation.values import Table

__all__ = ["PreparedData", "Scores", "evaluate", "held_out_rows", "main"]
LONGEST_WAIT = datetime.timedelta(days=2)  # of a rank that is done for those that are not


@dataclass(frozen=True)
class Scores:
    """What a model scored on how many samples (blocks of tokens, or texts)."""

    num_samples: int
    metrics: dict[str, float]


def evaluate(model: Any, task: Task, rows: Iterable[Row], batch_size: int | None = None) -> Scores:
    """Loss and scores of `rows` in this process, on the model's device; the model is left in eval mode."""
    model.eval()
    question = Learnt(task, None, Fields())
    one = Opened(type(model).__name__, Path(), "", [model])
    with tempfile.TemporaryDirectory() as folder, Spool(Path(folder), "", 0) as spool:
        budget = Budget.of(task.logits_width(model.config), None, batch_size)
        ask(question, one, of_rows(rows), spool, budget, World("python", 0, 0, 1, 1), lambda done: None)
        table = tabulated(merged(question, spool))
    if table.num_examples == 0:
        return Scores(0, task.metrics().result())
    return Scores(table.num_examples, point(question.measure(table), table.num_examples))


@dataclass(frozen=True)
class Scored:
    """One model's answers."""

    name: str
    fingerprint: str
    table: Table
    seconds: float


class Door:
    """One start of the command, on one rank."""

    def __init__(self, options: argparse.Namespace, world: World) -> None:
        self.options = options
        self.world = world
        self.asked: Asked | None = None

    def run(self) -> Results | None:
        """The results, on the first rank."""
        check_options(self.options)
        self._once(self._make_out)
        if self.options.harness:
            return self._harness()
        ours = self._scored([self.options.model, *(self.options.ensemble or ())], "MODEL", self._save_path())
        theirs = self._other()
        if ours is None or self.asked is None:
            return None
        return self._results(ours, theirs)

    def _once(self, decide: Callable[[], Any]) -> Any:
        return decide() if self.world.num_ranks == 1 else decide_on_first(decide)

    def _make_out(self) -> None:
        if self.options.out is not None:
            self.options.out.mkdir(parents=True, exist_ok=True)

    def _save_path(self) -> Path | None:
        if self.options.save is not None:
            return Path(self.options.save)
        return None if self.options.out is None else Path(self.options.out) / "predictions.jsonl"

    def _scored(self, names: list[str], where: str, save: Path | None) -> Scored | None:
        """What a model (or an ensemble) answers. On other ranks than the first: None."""
        options = self.options
        found: list[Place] = self._once(lambda: [find(name, where) for name in names])
        model = opened(
            found,
            auto_class(options.task),
            options.task,
            options.combine,
            options.device_map,
            options.trust_remote_code,
        )
        for module in model.modules:
            module.eval()
        reference = self._reference()
        self.asked = what = asked(model, options, reference)
        head = {
            "task": options.task,
            "model": model.name,
            "data": what.data,
            "options": question_digest(options),
            "fingerprints": {"model": model.fingerprint, "data": what.data_fingerprint},
        }
        key = _digest([head["options"], head["fingerprints"], reference.fingerprint if reference else ""])
        began = time.perf_counter()
        with self._spool_folder(save) as folder, Spool(folder, key, self.world.rank) as spool:
            wait_for_all(self.world)  # all have read what was found before, and none has found more
            if save is not None and self._once(lambda: self._is_finished(save, key)):
                table = tabulated(_from_file(save)) if self.world.is_first else None
            else:
                table = self._answers(what, model, spool, save, {**head, "key": key})
        seconds = time.perf_counter() - began
        return None if table is None else Scored(model.name, model.fingerprint, table, seconds)

    def _answers(
        self, what: Asked, model: Opened, spool: Spool, save: Path | None, head: dict[str, Any]
    ) -> Table | None:
        options = self.options
        vocab_size = max(int(getattr(model.config, "vocab_size", 0) or 0), 1)
        width = vocab_size if "LM" in what.question.auto_class else 1
        budget = Budget.of(width, options.max_batch_tokens, options.batch_size)
        with self._bar(what.count) as show:
            ask(what.question, model, what.examples(), spool, budget, self.world, show)
        wait_for_all(self.world)
        if not self.world.is_first:
            return None
        table = tabulated(merged(what.question, spool))
        check_not_empty(table, what.origin, what.data)
        if save is not None:
            saved(save, head, table.num_examples, merged(what.question, spool))
        return table

    def _reference(self) -> Opened | None:
        options = self.options
        if options.reference is None:
            return None
        found = self._once(lambda: [find(str(options.reference), "--reference")])
        return opened(found, auto_class(options.task), options.task, trust=options.trust_remote_code)

    @contextlib.contextmanager
    def _spool_folder(self, save: Path | None) -> Iterator[Path]:
        """Beside the file that is saved, where a killed run is found again; else one for this start alone."""
        if save is not None:
            folder = save.with_name(save.name + ".parts")
            self._once(lambda: folder.mkdir(parents=True, exist_ok=True))
            yield folder
        else:
            folder = Path(self._once(tempfile.mkdtemp))
            try:
                yield folder
            except BaseException:
                remove(folder)
                raise
        if self.world.is_first:
            remove(folder)

    def _is_finished(self, save: Path, key: str) -> bool:
        """Whether the file is there already, with the answers of this very question."""
        if not save.exists():
            return False
        head = next(read_predictions(save))
        if head.get("key") != key:
            rule = "holds the predictions of another model, other data or other options"
            raise DataError("--save" if self.options.save else "--out", str(save), rule, "name another file")
        return True

    @contextlib.contextmanager
    def _bar(self, count: int | None) -> Iterator[Callable[[int], None]]:
        columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        shown = console.is_terminal and self.world.is_first
        with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
            task = bar.add_task("scoring", total=count)
            yield lambda done: bar.update(task, completed=done)

    def _harness(self) -> Results:
        """On one rank: the harness deals nothing to others."""
        options = self.options
        if self.world.num_ranks > 1:
            raise DataError("--harness", self.world.num_ranks, "runs on one rank", "start it without torchrun")
        names = [options.model, *(options.ensemble or ())]
        model = opened(
            [find(name) for name in names], "AutoModelForCausalLM", "causal_lm", options.combine, options.device_map
        )
        began = time.perf_counter()
        scores, num_samples = harness_scores(model, options)
        return Results(
            task="harness",
            model=model.name,
            data=", ".join(options.harness),
            num_samples=num_samples,
            scores=scores,
            seconds=time.perf_counter() - began,
            fingerprints={
                "model": model.fingerprint,
                "question": _digest([options.harness, str(options.include_path)]),
            },
            limited=options.limit is not None,
        )

    def _other(self) -> Scored | None:
        """`--against`: a model that is asked the same, or the predictions of one that was."""
        name = self.options.against
        if name is None:
            return None
        if Path(name).is_file():
            return self._other_file(Path(name)) if self.world.is_first else None
        save = self._save_path()
        return self._scored([name], "--against", None if save is None else save.with_name(f"against-{save.name}"))

    def _other_file(self, path: Path) -> Scored:
        assert self.asked is not None
        head = next(read_predictions(path))
        if head["fingerprints"]["data"] != self.asked.data_fingerprint or head["task"] != self.options.task:
            rule = f"holds predictions of {head['task']} on {head['data']}, which is not what is scored here"
            raise DataError("--against", str(path), rule, "give predictions of the same task and data")
        return Scored(head["model"], head["fingerprints"]["model"], tabulated(_from_file(path)), 0.0)

    def _results(self, ours: Scored, theirs: Scored | None) -> Results:
        options, what = self.options, self.asked
        assert what is not None
        table, resamples = ours.table, options.resamples
        measure = what.question.measure(table)
        headline = what.question.headline
        curves = {ours.name: ours.table}
        more: dict[str, Any] = {}
        if theirs is not None:
            check_same(table, theirs.table, theirs.name)
            other = what.question.measure(theirs.table)
            more = {
                "against": theirs.name,
                "differences": tuple(differences(measure, other, table.num_examples, resamples)),
                "mcnemar": mcnemar(table, theirs.table),
            }
            curves[theirs.name] = theirs.table
        bins = {name: _reliability(one) for name, one in curves.items() if one.has("confidence")}
        results = Results(
            task=options.task,
            model=ours.name,
            data=what.data,
            num_samples=table.num_examples,
            scores=intervals(measure, table.num_examples, resamples),
            seconds=ours.seconds,
            fingerprints={
                "model": ours.fingerprint,
                "data": what.data_fingerprint,
                "question": _digest(question_digest(options)),
            },
            limited=options.limit is not None,
            slices=tuple(sliced(measure, table, name, headline, resamples) for name in options.slice or ()),
            calibration=bins.get(ours.name, []),
            **more,
        )
        if options.out is not None:
            write_results(results, options.out / "results.json")
            (options.out / "results.txt").write_text(table_of(results), encoding="utf-8")
            if bins:
                draw_reliability(options.out / "reliability.png", options.task, bins)
        return results


def _reliability(table: Table) -> list[dict[str, float]]:
    return reliability(table.columns["confidence"], table.columns["right"])


def _from_file(path: Path) -> Iterator[Found]:
    lines = read_predictions(path)
    next(lines)
    for number, line in enumerate(lines):
        yield Found(number, {}, {name: value for name, value in line.items() if name != "example"})


def _digest(value: Any) -> str:
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.evaluate", description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a model or adapter, run, step, or checkpoint (zero:DIR, dcp:DIR)")
    add("--task", choices=TASKS, help="what is asked; prepared data knows it")
    add("--data", nargs="+", metavar="FILE", help="files, folders or globs, as in a job spec")
    add("--prepared", type=Path, metavar="DIR", help="prepared data: its held-out samples are scored")
    add(
        "--against",
        metavar="OTHER",
        help="another model, or a --save file of one: is ours better on the same examples?",
    )
    add("--ensemble", nargs="+", metavar="MODEL", help="more models, asked together with the first")
    add(
        "--combine", choices=("mean", "vote"), default="mean", help="of an ensemble: mean probabilities, or a vote each"
    )
    add("--slice", action="append", metavar="COLUMN", help="scores by its values, or quarters; also length, source")
    add("--save", type=Path, metavar="FILE", help="a line for each example; a killed run goes on from it")
    add("--out", type=Path, metavar="DIR", help="results.json, results.txt, predictions.jsonl, reliability.png")
    add("--json", action="store_true", help="print one JSON object")
    reading = parser.add_argument_group("reading").add_argument
    reading("--column", action="append", metavar="FIELD=NAME", help="the column that a field is read from")
    reading("--text-column", help="short for --column text=NAME")
    reading("--label-column", help="short for --column label=NAME")
    reading("--format", help="as in a job spec; default: by the suffix")
    reading("--sample-by", choices=("document", "paragraph", "line"), help="text files; default: document")
    reading("--packing", choices=("concat", "none"), help="causal_lm, masked_lm, as in a job spec; default: concat")
    reading("--seq-len", type=int, help="tokens at once; default: the model's, at most 1024")
    reading("--set", action="append", metavar="KEY=VALUE", help="a key of task or data as in a job spec")
    reading("--limit", type=int, metavar="N", help="the first N examples only: quick, and not comparable")
    asking = parser.add_argument_group("asking").add_argument
    asking("--stride", type=int, help="perplexity: tokens that windows share; default: half a window")
    asking("--prompt", help="with {column}s; default: {query}, {context} or {prompt}")
    asking("--max-new-tokens", type=int, help="generation (default: 128)")
    asking("--stop", action="append", metavar="TEXT", help="generation: where an answer ends")
    asking("--extract", choices=("text", "number"), help="generation: what is compared (number: as in GSM8K)")
    asking("--apply-chat-template", action="store_true", help="generation: the prompt is a user's turn")
    asking("--harness", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness (extra `eval`)")
    asking(
        "--include-path", type=Path, metavar="DIR", help="--harness: YAML tasks of your own; only these are looked at"
    )
    asking("--reference", type=Path, metavar="DIR", help="preference: the model before it was trained")
    asking("--resamples", type=int, default=RESAMPLES, help="of the bootstrap (default: %(default)s)")
    computing = parser.add_argument_group("computing").add_argument
    computing("--batch-size", type=int, help="most rows at once; default: what the tokens allow")
    computing("--max-batch-tokens", type=int, help="of a batch; default: by the vocabulary; halved where memory ends")
    computing("--device-map", choices=("auto",), help="spread one large model over this process's devices")
    computing("--trust-remote-code", action="store_true", help="run the code in the model's folder")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(argv)
    world = World.detect(os.environ)
    try:
        with _ranks(world):
            results = Door(options, world).run()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    if results is not None:
        sys.stdout.write(json.dumps(results.to_json()) + "\n" if options.json else table_of(results))
    return EXIT_DONE


@contextlib.contextmanager
def _ranks(world: World) -> Iterator[None]:
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
    if world.num_ranks == 1 or dist.is_initialized():  # a caller of `main` may have ranks already
        yield
        return
    dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
