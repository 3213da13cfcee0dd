"""`fleetune demo`: a small GPT and a small BERT from texts to scored model folders, on two CPU ranks, without a network.

Every step is one that a user types; its command is shown before it runs. What it promises, it checks.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from launcher.data.prepare import prepare
from launcher.data.prepared import PreparedData, open_prepared
from launcher.emit import Via, launch_command
from launcher.errors import ABSENT, FleetuneError, UserError
from launcher.job import JobSpec, load_cluster, load_spec
from launcher.job.resources import resource_dir
from launcher.plan import Plan, make_plan
from launcher.plan.explain import explain
from launcher.spawn import free_port, run_until_done
from launcher.task import Task, task_of
from tools.convert import convert
from tools.corpus import write_corpus
from tools.demo_report import Learnt, Lesson, check_promises, majority_f1, next_commands, summary
from tools.evaluate import Scores, evaluate, held_out_rows
from tools.open_model import open_model, quiet_libraries

MARKER = ".fleetune-demo"
_RUN_MAKES = (
    *("data", "untrained", "hf", "logs", "checkpoints", "model"),
    *("plan.json", "metrics.jsonl", "outcome.json", "job.yaml"),
)
MADE = {"corpus": ("language.jsonl", "packages.jsonl"), "gpt": _RUN_MAKES, "bert": _RUN_MAKES}
"""Folder below the demo's -> what the demo puts into it: all that a second demo may delete."""

PROMPT = "Return the"


GPT = Lesson("gpt", "language.jsonl", "zero", "perplexity")
BERT = Lesson("bert", "packages.jsonl", "dcp", "f1")


def run_demo(folder: Path) -> None:
    """Run it all in `folder`, afresh. `FleetuneError` when a step fails or a promise is not kept."""
    console = Console(highlight=False)
    clear(folder)
    with _step(console, f"writing the corpus, from this Python's own documentation, into {folder / 'corpus'}"):
        corpus = write_corpus(folder / "corpus")
    console.print(
        f"  {corpus.num_language:,} texts; of {sum(corpus.num_packages.values()):,} the package is to be told"
    )
    gpt = learn(GPT, folder, console)
    with _step(console, "writing a little, with plain transformers"):
        written = sample(gpt.model_dir)
    console.print(written, style="italic", markup=False)
    bert = learn(BERT, folder, console)
    majority = majority_f1(bert.data)
    console.print(summary(gpt, bert, majority))
    for line in next_commands(gpt, bert):
        console.print(line, soft_wrap=True, markup=False)
    check_promises(gpt, bert, majority)


def clear(folder: Path) -> None:
    """Delete what an earlier demo made in `folder`, and nothing else; mark the folder before the first file is made."""
    found = [folder / sub / name for sub, names in MADE.items() for name in names if (folder / sub / name).exists()]
    marker = folder / MARKER
    if found and not marker.is_file():
        raise UserError(str(found[0]), ABSENT, "was not made by a demo and is in its way", "give another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text("made by `fleetune demo`, which may delete what it made here\n")
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def learn(lesson: Lesson, folder: Path, console: Console, more: Sequence[str] = ()) -> Learnt:
    """Prepare, plan, score untrained, train, convert, score. `more`: further `key=value` overrides of the job."""
    started = time.perf_counter()
    path = _job_file(lesson)
    overrides = (*_overrides(lesson, folder), *more)
    spec = load_spec(path, overrides)
    typed = shlex.join([_shown_path(path), *(word for override in overrides for word in ("--set", override))])
    console.rule(f"{lesson.name}: {spec.task.name}, {spec.parallel.strategy} on {spec.num_ranks} ranks")
    with _step(console, f"$ fleetune prepare {typed}") as status:
        prepare(spec, progress=lambda stage, number: status.update(f"{stage}: {number:,}"))
    data = open_prepared(spec)
    task = task_of(spec, data.facts(spec.task))
    with _step(console, f"$ fleetune plan {typed}"):
        plan = _plan(spec)
    console.print(explain(plan).partition("\n\n")[0], markup=False, soft_wrap=True)
    with _step(console, "scoring the untrained model on the held-out samples"):
        save_untrained(spec, task, data, Path(spec.output_dir) / "untrained")
        before = _score(Path(spec.output_dir) / "untrained", task, data)
    _train(spec, plan, path, overrides, typed, console)
    _convert(lesson, spec, console)
    with _step(
        console, "$ " + shlex.join(["fleetune", "eval", f"{spec.output_dir}/model", "--prepared", spec.prepared_dir])
    ):
        after = _score(Path(spec.output_dir) / "model", task, data)
    return Learnt(lesson, spec, plan, data, before, after, time.perf_counter() - started)


@contextmanager
def _step(console: Console, what: str) -> Iterator[Any]:
    """Say it, and show that it is being done; yields the live line."""
    console.print(what, style="bold", markup=False, soft_wrap=True)
    with console.status("working") as status:
        yield status


def _job_file(lesson: Lesson) -> Path:
    return resource_dir("jobs") / f"demo-{lesson.name}.yaml"


def _shown_path(path: Path) -> str:
    """As short as it can be typed from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _overrides(lesson: Lesson, folder: Path) -> tuple[str, ...]:
    """None for the folder that the job names itself."""
    wanted = {"output_dir": str(folder / lesson.name), "data.train": str(folder / "corpus" / lesson.corpus)}
    spec = load_spec(_job_file(lesson))
    if (spec.output_dir, spec.data.train) == tuple(wanted.values()):
        return ()
    return tuple(f"{key}={_as_yaml(value)}" for key, value in wanted.items())


def _as_yaml(text: str) -> str:
    """`--set` reads YAML, where a path may have to be quoted: `a: b`, `#1`, `2024`."""
    try:
        is_plain = yaml.safe_load(text) == text
    except yaml.YAMLError:
        is_plain = False
    return text if is_plain else json.dumps(text)


def _plan(spec: JobSpec) -> Plan:
    from launcher.cost.cache import cached_cost

    return make_plan(spec, cached_cost(spec), load_cluster(spec.cluster.name))


def save_untrained(spec: JobSpec, task: Task, data: PreparedData, folder: Path) -> None:
    """The weights that every rank starts from, as a model folder."""
    from transformers import AutoTokenizer

    from launcher.train.model import whole_model

    with quiet_libraries():
        whole_model(spec, task, data)[0].save_pretrained(folder)
    AutoTokenizer.from_pretrained(data.tokenizer_dir, trust_remote_code=False).save_pretrained(folder)


def _score(folder: Path, task: Task, data: PreparedData) -> Scores:
    return evaluate(open_model(folder, task.auto_class, task.name), task, held_out_rows(data), batch_size=32)


def _train(spec: JobSpec, plan: Plan, path: Path, overrides: Sequence[str], typed: str, console: Console) -> None:
    """In processes of their own: ZeRO by DeepSpeed's launcher, as its users would, FSDP by what `fleetune launch` starts."""
    via: Via = "deepspeed" if plan.engine == "deepspeed" else "torchrun"
    command = launch_command(plan, str(path), tuple(overrides), os.cpu_count() or 1, free_port(), via)
    shown = f"fleetune launch {typed}"
    if via == "deepspeed":
        shown = f"deepspeed --num_gpus {plan.num_ranks} launcher/run.py --spec {typed}"
    console.print(f"$ {shown}", style="bold", markup=False, soft_wrap=True)
    console.print("  starting the ranks: half a minute")
    code = run_until_done(command.argv, command.environment)
    if code != 0:
        raise FleetuneError(f"`{shown}` ended with exit code {code}; see {spec.output_dir}/logs")


def _convert(lesson: Lesson, spec: JobSpec, console: Console) -> None:
    from launcher.train.checkpoint import newest_complete
    from launcher.train.report import LOG

    saved = newest_complete(Path(spec.output_dir) / "checkpoints", LOG.warning)
    if saved is None:
        raise FleetuneError(f"{spec.output_dir} holds no checkpoint though the training ended well")
    source, target = f"{lesson.checkpoint_kind}:{saved.folder}", f"hf:{spec.output_dir}/model"
    with _step(console, "$ " + shlex.join(["python", "-m", "tools.convert", source, target])):
        convert(source, target)


def sample(folder: Path, num_tokens: int = 60) -> str:
    """What the model makes of `PROMPT`, drawn with a fixed seed; plain transformers, no fleetune."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    prompt = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    drawn = model.generate(**prompt, max_new_tokens=num_tokens, do_sample=True, temperature=0.7, top_k=40)
    return str(tokenizer.decode(drawn[0], skip_special_tokens=True))
