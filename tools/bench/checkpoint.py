"""`fleetune convert` against the converters of DeepSpeed, torch and accelerate, on one synthetic checkpoint, in one run.

    python -m tools.bench checkpoint --folder /scratch --layers 20                # about 1 B parameters, 12 GB
    python -m tools.bench checkpoint --folder /scratch --only weights

The source is ZeRO-3 of two ranks in bf16 with fp32 masters and both moments. Each contestant is a process of its own,
from its first import to the last fsync of what it wrote; its input is dropped from the page cache before. The peak is
of the resident memory of the process and its children together, looked at every 20 ms. Bytes are those of read and
write calls; what is mapped into memory is not among them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from launcher.spawn import start_python
from launcher.stored.state import STEP, Group, Optimizer, State
from launcher.stored.values import Ledger, Literal
from launcher.units import show_bytes, show_time
from tools.formats.files import JOURNAL, Copy
from tools.formats.write_zero import ZeroTarget, plan_zero

_LOOK_SECONDS = 0.02
_NOISE = 1 << 20
WIDTH, INNER, VOCAB = 2048, 5632, 32000
"""TinyLlama's sizes: 44 M parameters a block, 131 M in both embeddings."""
LONGEST_SECONDS = 1500


class Measured(NamedTuple):
    seconds: float
    peak_bytes: int
    read_bytes: int
    written_bytes: int
    error: str | None = None


class Noise:
    """A tensor of normal numbers, the same few again and again; it lies nowhere."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        self.shape, self.dtype, self.seed = shape, torch.float32, seed

    def read(self, start: int, into: torch.Tensor, ledger: Ledger | None = None) -> None:
        at = 0
        while at < into.numel():
            first = (self.seed * 7919 + start + at) % _NOISE
            size = min(into.numel() - at, _NOISE)
            into[at : at + size] = _noise()[first : first + size]
            at += size


@cache
def _noise() -> torch.Tensor:
    return torch.randn(2 * _NOISE, generator=torch.Generator().manual_seed(0)) * 0.02


def write_source(folder: Path, layers: int) -> int:
    """A Llama of `layers` blocks as DeepSpeed would have saved it; its number of parameters."""
    shapes = dict(_shapes(layers))
    tensors = {name: Noise(shape, 3 * index) for index, (name, shape) in enumerate(shapes.items())}
    state: dict[str, Any] = {}
    for index, (name, shape) in enumerate(shapes.items()):
        moments = {"exp_avg": Noise(shape, 3 * index + 1), "exp_avg_sq": Noise(shape, 3 * index + 2)}
        state[name] = {STEP: Literal(torch.tensor(7.0)), **moments}
    matrices = tuple(name for name, shape in shapes.items() if len(shape) > 1)
    vectors = tuple(name for name, shape in shapes.items() if len(shape) == 1)
    common = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8}
    groups = (Group({**common, "weight_decay": 0.1}, matrices), Group({**common, "weight_decay": 0.0}, vectors))
    made = State("zero", folder, tensors, buffers=frozenset(), optimizer=Optimizer(groups, state), step=7)
    folder.mkdir(parents=True)
    Copy(folder, plan_zero(made, ZeroTarget(3, 2, torch.bfloat16)), None, lambda *_: None).run("")
    (folder / JOURNAL).unlink()
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def _shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCAB, WIDTH)
    for number in range(layers):
        block = f"model.layers.{number}"
        for name, rows in (("q", WIDTH), ("k", WIDTH // 8), ("v", WIDTH // 8), ("o", WIDTH)):
            yield f"{block}.self_attn.{name}_proj.weight", (rows, WIDTH)
        for name, shape in (("gate", (INNER, WIDTH)), ("up", (INNER, WIDTH)), ("down", (WIDTH, INNER))):
            yield f"{block}.mlp.{name}_proj.weight", shape
        yield f"{block}.input_layernorm.weight", (WIDTH,)
        yield f"{block}.post_attention_layernorm.weight", (WIDTH,)
    yield "model.norm.weight", (WIDTH,)
    yield "lm_head.weight", (VOCAB, WIDTH)


def write_config(folder: Path, layers: int) -> None:
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "vocab_size": VOCAB,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    folder = options.folder / "bench-checkpoint"
    source = folder / "zero3"
    if not source.exists():
        started = time.perf_counter()
        count = write_source(source, options.layers)
        sys.stdout.write(f"wrote {count:,} parameters with two moments in {show_time(time.perf_counter() - started)}\n")
    write_config(folder / "config", options.layers)
    size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    sys.stdout.write(f"source: zero3 of 2 ranks, {show_bytes(size)}; {os.cpu_count()} cores\n")
    try:
        for title in options.only or GROUPS:
            _print(title, {name: _measure(name, folder) for name in GROUPS[title]})
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    return 0


def _print(title: str, found: dict[str, Measured]) -> None:
    base = next(iter(found.values()))
    sys.stdout.write(f"\n{title}\n{'':<32}{'time':>10}{'ratio':>7}{'peak':>11}{'read':>11}{'written':>11}\n")
    for name, one in found.items():
        if one.error:
            sys.stdout.write(f"{name:<32}{one.error}\n")
            continue
        ratio = one.seconds / base.seconds if not base.error else float("nan")
        sizes = "".join(f"{show_bytes(value):>11}" for value in (one.peak_bytes, one.read_bytes, one.written_bytes))
        sys.stdout.write(f"{name:<32}{show_time(one.seconds):>10}{ratio:>7.2f}{sizes}\n")
    sys.stdout.flush()


def _measure(name: str, folder: Path) -> Measured:
    out = folder / "out"
    _remove(out)
    _forget(folder)
    started = time.perf_counter()
    child = start_python(__name__, {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"})
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps({"name": name, "folder": str(folder)}).encode())
    child.stdin.close()
    process, peak = psutil.Process(child.pid), 0
    while child.poll() is None:
        peak = max(peak, _resident(process))
        time.sleep(_LOOK_SECONDS)
    seconds = time.perf_counter() - started
    told = child.stdout.read().decode().splitlines()
    _remove(out)
    if child.returncode != 0 or not told:
        return Measured(seconds, peak, 0, 0, f"failed with code {child.returncode} after {show_time(seconds)}")
    answer = json.loads(told[-1])
    return Measured(seconds, peak, answer["read"], answer["written"])


def _remove(out: Path) -> None:
    if out.is_file():
        out.unlink()
    shutil.rmtree(out, ignore_errors=True)


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


def _forget(folder: Path) -> None:
    """Drops what is under `folder` from the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


# The contestants; each leaves its result under `out`.


def _plain_copy(folder: Path, out: Path) -> None:
    """As many bytes as the fp32 weights have, read and written as `cp` does."""
    out.mkdir()
    left = sum(torch.Size(shape).numel() for _, shape in _shapes(_layers(folder))) * 4
    for file in sorted((folder / "zero3").rglob("*_optim_states.pt")):
        with file.open("rb", buffering=0) as source, (out / file.name).open("wb", buffering=0) as target:
            while left and (chunk := source.read(min(left, 1 << 20))):
                target.write(chunk)
                left -= len(chunk)


def _layers(folder: Path) -> int:
    return int(json.loads((folder / "config" / "config.json").read_text())["num_hidden_layers"])


def _zero_to_fp32(folder: Path, out: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    convert_zero_checkpoint_to_fp32_state_dict(str(folder / "zero3"), str(out), safe_serialization=True)


def _ds_to_universal(folder: Path, out: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main as universal

    tag = next((folder / "zero3").glob("global_step*"))
    out.mkdir()
    universal(
        argparse.Namespace(
            input_folder=str(tag), output_folder=str(out), num_extract_workers=4, num_merge_workers=2,
            keep_temp_folder=False, strict=True, inject_missing_state=True,
        )
    )  # fmt: skip


def _ours(source: str, target: str, **options: Any) -> Callable[[Path, Path], None]:
    def run(folder: Path, out: Path) -> None:
        from tools.convert import convert

        given: dict[str, Any] = {
            key: str(folder / "config") if key == "config_dir" else value for key, value in options.items()
        }
        convert(f"{source}:{folder / NAMED[source]}", f"{target}:{out}", **given)

    return run


def _make_dcp(folder: Path, out: Path) -> None:
    from tools.convert import convert

    convert(f"zero:{folder / 'zero3'}", f"dcp:{folder / 'dcp'}", ranks=2)


def _dcp_to_torch(folder: Path, out: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder / "dcp", out)


def _merge_weights(folder: Path, out: Path) -> None:
    from accelerate.utils import merge_fsdp_weights  # type: ignore[import-untyped]

    merge_fsdp_weights(str(folder / "dcp"), str(out), safe_serialization=True)


NAMED = {"zero": "zero3", "dcp": "dcp"}
CONTESTANTS: dict[str, Callable[[Path, Path], None]] = {
    "DeepSpeed zero_to_fp32": _zero_to_fp32,
    "fleetune zero: -> hf:": _ours("zero", "hf", no_config=True),
    "the same with --config": _ours("zero", "hf", config_dir=True),
    "the same as bf16": _ours("zero", "hf", no_config=True, dtype="bf16"),
    "plain copy of these bytes": _plain_copy,
    "DeepSpeed ds_to_universal": _ds_to_universal,
    "fleetune zero: -> universal:": _ours("zero", "universal"),
    "fleetune zero: -> zero: 3 ranks": _ours("zero", "zero", ranks=3),
    "torch dcp_to_torch_save": _dcp_to_torch,
    "fleetune dcp: -> torch:": _ours("dcp", "torch"),
    "accelerate merge-weights": _merge_weights,
    "fleetune dcp: -> hf:": _ours("dcp", "hf", no_config=True),
    "fleetune zero: -> dcp:": _make_dcp,
}
GROUPS = {
    "weights": list(CONTESTANTS)[:5],
    "optimizer": list(CONTESTANTS)[5:8],
    "dcp": ["fleetune zero: -> dcp:"],
    "torch": list(CONTESTANTS)[8:10],
    "accelerate": list(CONTESTANTS)[10:12],
}
"""Title -> contestants; ratios are to the first. `dcp` makes the source of the last two."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench checkpoint", description=str(__doc__).partition("\n")[0]
    )
    parser.add_argument("--folder", type=Path, required=True, help="on a disk with room for three times the source")
    parser.add_argument("--layers", type=int, default=20, help="44 M parameters each (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=tuple(GROUPS), help="these comparisons alone")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint for the next run")
    return parser


def _contestant() -> None:
    asked = json.load(sys.stdin)
    folder = Path(asked["folder"])
    answers, sys.stdout = sys.stdout, sys.stderr  # peers print
    CONTESTANTS[asked["name"]](folder, folder / "out")
    for file in [path for path in (folder / "out", *(folder / "out").rglob("*")) if path.is_file()]:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    answers.write(json.dumps({"read": int(counts["rchar"]), "written": int(counts["wchar"])}) + "\n")


if __name__ == "__main__":
    _contestant()
