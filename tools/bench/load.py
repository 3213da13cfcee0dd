"""RAM while a model is loaded, all ranks together, in copies of the model: ours beside every rank building the whole.

Counted above what the same ranks need for a model of almost nothing: modules that are imported late, communicators. On
CPU ranks the device is this RAM too, so ddp and zero2 must end with a copy for each rank.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import product
from typing import Any

from launcher.errors import DataError
from launcher.spawn import run_ranks

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp")
WAYS = ("every rank", "fleetune")
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench load", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of ranks (default: 2 4)")
    parser.add_argument("--strategy", choices=STRATEGIES, nargs="+", default=list(STRATEGIES), help="default: all")
    options = parser.parse_args(argv)
    sys.stdout.write(f"{'strategy':<9} {'ranks':>5} {'every rank builds it':>21} {'fleetune':>9} {'at the end':>11}\n")
    with tempfile.TemporaryDirectory() as folder:
        size = _model(f"{folder}/model", 512, 8000) - _model(f"{folder}/nothing", 16, 16)
        for strategy, ranks in product(options.strategy, options.ranks):
            nothing = _held(f"{folder}/nothing", strategy, ranks, "fleetune")
            naive, ours = (_held(f"{folder}/model", strategy, ranks, way) for way in WAYS)
            above = [naive["peak"] - nothing["peak"], ours["peak"] - nothing["peak"], ours["end"] - nothing["end"]]
            copies = [num_bytes / size for num_bytes in above]
            sys.stdout.write(f"{strategy:<9} {ranks:>5} {copies[0]:>21.2f} {copies[1]:>9.2f} {copies[2]:>11.2f}\n")
            sys.stdout.flush()
        sys.stdout.write(f"copies of a Llama of {size / 2**20:.0f} MiB in fp32\n")
    return 0


def _model(folder: str, width: int, vocab_size: int) -> int:
    """A Llama with weights; returns the bytes of its parameters."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": width * 11 // 4, "num_hidden_layers": 10}
    config = transformers.LlamaConfig(vocab_size=vocab_size, num_attention_heads=8, **sizes)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def _held(folder: str, strategy: str, ranks: int, way: str) -> dict[str, int]:
    lines: list[str] = []
    code = run_ranks("tools.bench._load_rank", ranks, [folder, strategy, way], _ENVIRONMENT, lines.append)
    found = [line for line in lines if line.startswith('{"peak"')]
    if code or not found:
        raise DataError("load", strategy, f"did not run: {(lines or ['no word'])[-1]}", "see what the ranks wrote")
    return dict(json.loads(found[0]))
