"""What several kinds of tests share: small real jobs, and starting real ranks."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

REPO = Path(__file__).resolve().parents[1]
BATCH = 8
GPT = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 48, "resid_pdrop": 0.0}
GPT |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0}
BERT = {"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
BERT |= {"intermediate_size": 64, "max_position_embeddings": 48}
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def documentation() -> dict[str, str]:
    """Python's own reference, which every install carries: topic -> text. Read, not imported."""
    source = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py").read_text(encoding="utf-8")
    assignment = next(node for node in ast.parse(source).body if isinstance(node, ast.Assign))
    return ast.literal_eval(assignment.value)


def write_corpus(folder: Path, num_records: int = 400) -> Path:
    """jsonl with `text` of uneven length and a `label` that can be learnt from it."""
    paragraphs = (part.strip() for text in documentation().values() for part in text.split("\n\n"))
    texts = [text[: 20 + 7 * (number % 30)] for number, text in enumerate(t for t in paragraphs if len(t) > 80)]
    path = folder / "corpus.jsonl"
    with path.open("w") as file:
        for text in texts[:num_records]:
            file.write(json.dumps({"text": text, "label": "code" if "`" in text or "(" in text else "prose"}) + "\n")
    return path


def job(folder: Path, corpus: Path, family: str, **overrides: Any) -> dict[str, Any]:
    """A small job; `overrides` are dotted keys with `__` for the dot."""
    raw: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"from_config": dict(GPT if family == "gpt" else BERT)},
        "task": "causal_lm" if family == "gpt" else "sequence_classification",
        "data": {"train": str(corpus), "train_tokenizer": {"vocab_size": 400}},
        "training": {"seq_len": 48, "global_batch_size": BATCH, "max_steps": 20, "lr": 2e-3, "warmup_steps": 3},
        "cluster": {"name": "cpu", "gpus_per_node": 2},
        "tracking": {"log_every_steps": 1},
        "seed": 11,
    }
    raw["training"] |= {"weight_decay": 0.1}
    if family == "gpt":
        raw["data"] |= {"packing": "none"}
    for dotted, value in overrides.items():
        *path, last = dotted.split("__")
        node = raw
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return raw


def rank_environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPO),
    }


def torchrun(num_ranks: int, *script: str | Path) -> list[str]:
    ranks = ["--standalone", "--nproc-per-node", str(num_ranks)]
    return [sys.executable, "-m", "torch.distributed.run", *ranks, *map(str, script)]


@contextmanager
def started(argv: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher and its ranks, all killed when the block is left."""
    with log.open("wb") as output:
        child = subprocess.Popen(argv, stdout=output, stderr=output, env=rank_environment())
        try:
            yield child
        finally:
            kill_tree(child)


def kill_tree(child: subprocess.Popen[bytes]) -> None:
    """`kill -9` of the launcher and of every rank: torchrun gives each rank a session of its own."""
    try:
        launcher = psutil.Process(child.pid)
        tree = [*launcher.children(recursive=True), launcher]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(tree)
    child.wait()


def run_ranks(argv: list[str], log: Path, timeout_seconds: float = 900) -> int:
    """Run to the end and return the exit code."""
    with started(argv, log) as child:
        return child.wait(timeout=timeout_seconds)


def records(output_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The records of `metrics.jsonl` of one kind."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]
