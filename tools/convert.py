"""Turns a checkpoint of one format into another, in stretches of a few megabytes: no tensor is ever held whole.

    python -m tools.convert zero:runs/a/checkpoints/step-00000020 hf:out --dtype bf16
    python -m tools.convert zero:ckpt dcp:out --ranks 16

Formats are known by `tools/formats`, what is done with them by `tools/conversion`; this file is the command.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TransferSpeedColumn
from rich.progress import Progress as ProgressBar

from launcher.errors import ABSENT, EXIT_DONE, EXIT_OURS, CheckpointError, UserError
from launcher.stored.safe_pickle import trusting
from launcher.stored.state import State
from launcher.stored.tensors import Progress
from launcher.stored.values import Ledger, Values
from tools.averages import best_step, moving_average, newest_steps
from tools.conversion.altering import average, parse_weights
from tools.conversion.model import plan_model, plan_weights
from tools.conversion.opening import KINDS, READERS, Opened, check_renamed, open_state, read_rename, split_kind
from tools.conversion.options import (
    DEFAULT_SHARD_BYTES,
    DTYPES,
    TARGETS,
    Options,
    check_options,
    parse_size,
)
from tools.conversion.placing import Result, appearing, check_target, place
from tools.conversion.sharded import plan_sharded
from tools.conversion.verify import verify_result
from tools.formats.files import Planned
from tools.formats.hf import copy_side_files, fsync_folder
from tools.formats.locate import has_adapter, locate

STRATEGIES = {"zero1": 1, "zero2": 2, "zero3": 3}


@dataclass(frozen=True)
class ConvertResult:
    """What was written."""

    folder: Path
    kind: str
    num_tensors: int
    num_bytes: int
    """Of values, in all files."""
    num_files: int
    """That hold values."""
    architecture: str | None = None
    """The class that opens it."""
    library: str = "transformers"
    """That has the class."""
    with_optimizer: bool = False

    def sentence(self) -> str:
        size = f"{self.num_tensors} tensors, {self.num_bytes} bytes, {self.num_files} file(s)"
        wrote = f"wrote {self.folder}: {size}"
        if self.architecture is None:
            kept = "with the optimiser" if self.with_optimizer else "weights alone"
            return f"{wrote}; {self.kind}, {kept}{_opening(self.kind, self.with_optimizer)}"
        opened = f"{self.library}.{self.architecture}.from_pretrained({json.dumps(str(self.folder))})"
        opener = f"import {self.library}; m = {opened}"
        return f"{wrote}; open it: python -c {shlex.quote(opener)}"


def _opening(kind: str, with_optimizer: bool) -> str:
    if kind == "zero" and not with_optimizer:
        return "; load it with load_optimizer_states=False"
    return ""


def convert(
    source: str,
    target: str,
    *,
    dtype: str | None = None,
    shard_size_bytes: int = DEFAULT_SHARD_BYTES,
    config_dir: str | Path | None = None,
    merge: bool = False,
    base_dir: str | Path | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> ConvertResult:
    """`source` (`KIND:PATH`, or a recognisable path) to `target` (`KIND:OUT`; without a kind hf:).

    `more` are the further fields of `Options`. Raises CheckpointError for whatever is wrong with the input; OUT then
    does not exist.
    """
    base = Path(base_dir) if base_dir else None
    config = Path(config_dir) if config_dir else None
    options = Options(dtype, shard_size_bytes, config, merge=merge, base_dir=base, **more)
    kind, path = split_kind(target, TARGETS)
    return _Conversion(source, kind or "hf", Path(path), options, progress or _silent).run()


class _Conversion:
    """One run of the command."""

    def __init__(self, source: str, kind: str, out: Path, options: Options, report: Progress) -> None:
        self.source, self.kind, self.out, self.options, self.report = source, kind, out, options, report

    def run(self) -> ConvertResult:
        if self.kind == "onnx":
            way_out = "write hf:, and export that with optimum or torch.onnx"
            raise CheckpointError("onnx", ABSENT, "is not written yet", way_out)
        check_options(self.options, self.kind)
        check_target(self.out, self.one_file)
        opened = self._opened()
        check_renamed(opened.state, self.options.rename)
        opened = replace(opened, state=self._prepared(self._averaged(opened)))
        if self.kind == "gguf":
            return self._gguf(opened)
        if self.kind in ("hf", "peft"):
            return self._inference(opened)
        return self._sharded(opened)

    @property
    def one_file(self) -> bool:
        return self.kind in ("torch", "gguf")

    def _opened(self) -> Opened:
        source, options = self.source, self.options
        if options.best or options.average > 1:
            run = Path(split_kind(source, KINDS)[1])
            source = str(best_step(run) if options.best else newest_steps(run, options.average)[0])
        return open_state(source, options.base_dir, self.report)

    def _averaged(self, opened: Opened) -> State:
        """Of a run's moving average, of its last checkpoints, of several sources."""
        options = self.options
        state = moving_average(opened.checkpoint, opened.state) if options.ema else opened.state
        others = [*options.soup]
        if options.average > 1:
            run = Path(split_kind(self.source, KINDS)[1])
            others += [str(step) for step in newest_steps(run, options.average)[1:]]
        if not others:
            return state
        return average([state, *(open_state(one, None, self.report).state for one in others)], options.soup_weights)

    def _prepared(self, state: State) -> State:
        if self.options.rename:
            state = state.renamed(self.options.rename)
        return state.without_optimizer() if self.options.only_weights else state

    def _sharded(self, opened: Opened) -> ConvertResult:
        state = opened.state
        configs = self.options.config_dir or opened.checkpoint.config_dir
        files = plan_sharded(state, self.kind, self.out.name, self.options, configs)
        self._place(opened, files, lambda folder, _crcs: self._verify(folder, state))
        return self._result(len(state.tensors), files, with_optimizer=state.optimizer is not None)

    def _inference(self, opened: Opened) -> ConvertResult:
        if opened.state.kind == "peft" and self.kind == "hf":
            return self._merged_peft(opened)
        configs = None if self.options.no_config else self._configs(opened)
        adapted = configs is not None and has_adapter(configs)
        if self.options.merge and not adapted:
            raise CheckpointError("--merge", ABSENT, f"{opened.where} holds no adapters", "leave it out")
        if self.kind == "peft" and not adapted:
            raise CheckpointError(opened.where, ABSENT, "holds no adapters", "write hf:")
        if adapted and not self.options.merge:
            return self._adapter(opened, configs)
        state = opened.state
        options = self.options
        if configs is not None and adapted:
            from tools.conversion.merging import merged  # peft and transformers, for this alone

            state = merged(opened.state, configs, opened.base)
            options = replace(options, dtype=options.dtype or "fp32")  # the sum is made in fp32
        return self._model(opened, state, configs, options)

    def _gguf(self, opened: Opened) -> ConvertResult:
        from tools.conversion.gguf_file import GgufPlan  # transformers and gguf, for this alone

        plan, ledger = GgufPlan(opened.state, self._configs(opened), self.options.torch_dtype), Ledger()
        with appearing(self.out, plan.num_bytes, one_file=True) as folder:
            plan.write(folder / self.out.name, ledger, self.report)
            ledger.check(lambda done, total: self.report("checking", done, total))
        return ConvertResult(self.out, "gguf", len(plan.values), plan.num_bytes, 1)

    def _merged_peft(self, opened: Opened) -> ConvertResult:
        from tools.conversion.merging import merged_peft, peft_base  # peft and transformers, for this alone

        base = peft_base(opened.state, self.options.base_dir)
        options = replace(self.options, dtype=self.options.dtype or "fp32")
        return self._model(opened, merged_peft(opened.state, base), self.options.config_dir or base, options)

    def _model(self, opened: Opened, state: State, configs: Path | None, options: Options) -> ConvertResult:
        plan = plan_weights(state, options) if configs is None else plan_model(state, configs, options)

        def finish(folder: Path, crcs: Any) -> None:
            plan.finish(folder, crcs)
            self._verify(folder, replace(state, tensors=plan.values, aliases={}, optimizer=None))
            self._check(folder, state, configs)

        self._place(opened, plan.files, finish)
        return self._result(len(plan.entries), plan.files, plan.architecture)

    def _place(self, opened: Opened, files: list[Planned], finish: Any) -> None:
        place(Result(self.out, files, finish, self.options.told(), self.one_file), opened.is_proved, self.report)

    def _verify(self, folder: Path, state: State) -> None:
        """What is in the folder, before it gets its name."""
        if not self.options.verify:
            return
        inside = folder / self.out.name if self.one_file else folder
        found = locate(inside, self.kind)  # type: ignore[arg-type]
        verified = verify_result(_flat(state), READERS[found.kind](found.folder), self.report)
        sys.stderr.write(f"verified {verified.num_tensors} tensors, norm {verified.norm:.9g}\n")

    def _check(self, folder: Path, state: State, configs: Path | None) -> None:
        if self.options.check is None or configs is None:
            return
        from tools.conversion.checking import compare_logits  # two models in memory, for this alone

        found = compare_logits(state, configs, folder, self.options.check)
        sys.stderr.write(found.sentence() + "\n")

    def _result(
        self, count: int, files: list[Planned], architecture: str | None = None, with_optimizer: bool = False
    ) -> ConvertResult:
        size = sum(slot.num_bytes for file in files for slot in file.slots)
        num_files = sum(1 for file in files if file.slots)
        return ConvertResult(self.out, self.kind, count, size, num_files, architecture, with_optimizer=with_optimizer)

    def _configs(self, opened: Opened) -> Path:
        found = self.options.config_dir or opened.checkpoint.config_dir
        if found is None:
            rule = "comes without a config.json"
            way_out = "name the folder with the model's config and tokenizer: --config DIR"
            raise CheckpointError(opened.where, ABSENT, rule, way_out)
        return found

    def _adapter(self, opened: Opened, configs: Path | None) -> ConvertResult:
        """A PEFT folder: the adapters, and the tokenizer beside them."""
        from tools.adapter import OPENERS, read_adapted, write_adapter  # peft and transformers, for this alone

        assert configs is not None
        if opened.base is None:
            rule = "holds adapters of a base model that exists only in this checkpoint"
            raise CheckpointError(opened.where, ABSENT, rule, "write the merged model: --merge")
        adapted = read_adapted(opened.state, configs, opened.where)
        num_bytes = sum(tensor.numel() * 4 for tensor in adapted.tensors.values())
        with appearing(self.out, num_bytes) as folder:
            written, num_bytes = write_adapter(adapted, opened.base, folder, self.options.torch_dtype)
            copy_side_files(configs, folder)
            fsync_folder(folder)
        task = str(adapted.model.peft_config["default"].task_type)
        opener = OPENERS.get(task, "AutoPeftModel")
        return ConvertResult(self.out, "peft", written, num_bytes, 1, opener, library="peft")


def _flat(state: State) -> dict[str, Values]:
    """Weights by name, the optimiser's states as `<parameter>/<state>`."""
    found = dict(state.tensors) | {name: state.tensors[kept] for name, kept in state.aliases.items()}
    for name, states in (state.optimizer.state if state.optimizer else {}).items():
        found |= {f"{name}/{key}": values for key, values in states.items()}
    return found


def _silent(_what: str, _done: int, _total: int) -> None:
    """No progress is shown when nobody asked for it."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.convert", description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("source", metavar="SRC", help="zero:, universal:, dcp:, hf:, torch: or peft: and a path; most need no prefix")
    add(
        "target", metavar="DST", help="zero:, universal:, dcp:, hf:, torch: or peft: and a path that does not exist yet"
    )
    add("--dtype", choices=tuple(DTYPES), help="cast floating weights; default: as stored (fp32 masters)")
    add("--shard-size", default="5GB", help="largest size of one weights file of hf: (default: %(default)s)")
    add("--config", metavar="DIR", help="folder with config.json and tokenizer, if the source has none")
    add("--no-config", action="store_true", help="hf: weights and index alone, by the checkpoint's own names")
    add("--only-weights", action="store_true", help="leave the optimiser out")
    add("--ranks", type=int, help="how many ranks zero: and dcp: are cut for; default: as the source")
    add("--stage", type=int, choices=(1, 2, 3), help="of ZeRO, for zero: and universal:; default: the source's, or 3")
    add("--strategy", choices=tuple(STRATEGIES), help="the same by fleetune's names")
    add("--rename", metavar="JSON", help="file with an object: old name -> new name")
    add("--verify", action="store_true", help="open the result and compare every value before it gets its name")
    add("--best", action="store_true", help="the checkpoint with the best held-out score")
    add("--ema", action="store_true", help="the moving average of the weights (training.ema_decay)")
    add("--average", type=int, default=1, metavar="N", help="the mean of the last N checkpoints")
    add("--soup", nargs="+", metavar="SRC", help="further checkpoints: write the mean of all")
    add("--weights", metavar="1,2,1", help="of the mean: one number for SRC and for each of --soup")
    add("--prune", metavar="0.5|2:4", help="hf: zeros in linear layers: a share of each, or all but 2 of every 4")
    add("--quantize", choices=("int8", "int4"), help="hf: weights of linear layers as integers (compressed-tensors)")
    add("--check", metavar="PROMPT", help="hf: run it through source and result and print how far they are apart")
    add("--trust", action="store_true", help="run whatever else a pickled file names; each name is told before it runs")
    add("--merge", action="store_true", help="adapters: write the model with them merged into it")
    add("--base", metavar="DIR", help="adapters: folder of the base model, where it has moved")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(argv)
    try:
        with trusting(_tell) if options.trust else nullcontext():
            result = with_progress(lambda show: _convert(options, show))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except OSError as error:  # a disk that is full or not ours: no fault of the input, and no traceback helps
        sys.stderr.write(f"error: {error.filename or options.target}: {error.strerror}\n")
        return EXIT_OURS
    sys.stdout.write(result.sentence() + "\n")
    return EXIT_DONE


def _tell(name: str) -> None:
    sys.stderr.write(f"--trust: runs {name}\n")


def _convert(options: argparse.Namespace, show: Progress) -> ConvertResult:
    if options.strategy and options.stage:
        raise CheckpointError("--strategy", options.strategy, "says what --stage says", "give one of them")
    return convert(
        options.source,
        options.target,
        dtype=options.dtype,
        shard_size_bytes=parse_size(options.shard_size),
        config_dir=options.config,
        merge=options.merge,
        base_dir=options.base,
        progress=show,
        no_config=options.no_config,
        ranks=options.ranks,
        stage=options.stage or STRATEGIES.get(options.strategy),
        only_weights=options.only_weights,
        rename=read_rename(options.rename),
        verify=options.verify,
        best=options.best,
        ema=options.ema,
        average=options.average,
        soup=tuple(options.soup or ()),
        soup_weights=parse_weights(options.weights),
        prune=options.prune,
        quantize=options.quantize,
        check=options.check,
    )


def with_progress(body: Callable[[Progress], ConvertResult]) -> ConvertResult:
    """Runs `body` with a bar on stderr for each thing that is being done."""
    columns = ("[progress.description]{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with ProgressBar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        return body(show)


if __name__ == "__main__":
    raise SystemExit(main())
