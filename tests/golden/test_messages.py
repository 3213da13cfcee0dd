"""What a user reads after a mistake: command, whole message and exit code, in one file compared whole.

Every case runs the real command line in an empty folder, and leaves it as it found it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from launcher import cli
from tests.golden.compare import Golden
from tests.unit.costs import measured_here

SPEC = """\
output_dir: run
model:
  from_config: {model_type: gpt2, n_layer: 2, n_embd: 32, n_head: 2, n_positions: 48}
task: causal_lm
data:
  train: corpus.jsonl
  train_tokenizer: {vocab_size: 400}
training: {seq_len: 48, global_batch_size: 8, max_steps: 20}
parallel: {precision: fp32}
cluster: {name: cluster.yaml, gpus_per_node: 2}
"""
CLUSTER = """\
gpu:
  {name: Some GPU, kind: cuda, memory_gib: 16, context_gib: 1, bf16: true, fp16: true,
   peak_bf16_tflops: 312, peak_fp32_tflops: 19.5, memory_gb_per_s: 1555, matmul_share: 0.8, matmul_half_width: 400,
   attention_share: 0.3, memory_share: 0.8, overlap_share: 0.5, launch_us: 5}
link: {intra_node_gb_per_s: 300, inter_node_gb_per_s: 25, link_share: 0.8, latency_us: 30}
host: {memory_gib: 512, memory_gb_per_s: 200, device_gb_per_s: 20, disk_gb_per_s: 2}
sources:
  gpu.memory_gib: data sheet
  gpu.context_gib: measured
  gpu.bf16: data sheet
  link.intra_node_gb_per_s: data sheet
  link.inter_node_gb_per_s: data sheet
"""
CLUSTER += "".join(
    f"  {figure}: measured\n"
    for figure in (
        *("gpu.peak_bf16_tflops", "gpu.peak_fp32_tflops", "gpu.memory_gb_per_s", "gpu.matmul_share"),
        *("gpu.matmul_half_width", "gpu.attention_share", "gpu.memory_share", "gpu.overlap_share", "gpu.launch_us"),
        *("link.link_share", "link.latency_us", "gpu.fp16", "host.memory_gib", "host.memory_gb_per_s"),
        *("host.device_gb_per_s", "host.disk_gb_per_s"),
    )
)


FOREIGN = "is not valid YAML|is not valid JSON|cannot be read|cannot be opened|cannot be built for causal_lm|is refused by gpt2"


class Case(NamedTuple):
    name: str
    argv: str
    """The words after `fleetune`; `SPEC` above lies in job.yaml, `CLUSTER` in cluster.yaml."""
    files: dict[str, str | bytes] = {}  # noqa: RUF012 - a NamedTuple's default, never altered


def spec(name: str, *replacements: tuple[str, str], more: str = "", command: str = "plan job.yaml") -> Case:
    """A case whose spec differs from the good one in these words."""
    text = SPEC
    for old, new in replacements:
        assert old in text, f"{name}: {old!r} is not in the spec"
        text = text.replace(old, new)
    return Case(name, command, {"job.yaml": text + more})


def cluster(name: str, *replacements: tuple[str, str]) -> Case:
    text = CLUSTER
    for old, new in replacements:
        assert old in text, f"{name}: {old!r} is not in the cluster file"
        text = text.replace(old, new)
    return Case(name, "plan job.yaml", {"cluster.yaml": text})


def site(name: str, text: str, **others: str) -> Case:
    """A cluster file of a site's own, and other files beside it."""
    files = {f"{key}.yaml": other for key, other in others.items()}
    return Case(name, "plan job.yaml --set cluster.name=./site.yaml", {"site.yaml": text, **files})


def preset(name: str, text: str, strategy: str = "zero2") -> Case:
    options = f"--set parallel.strategy={strategy} --set parallel.deepspeed_preset=./preset.json"
    return Case(name, f"plan job.yaml {options} --emit out", {"preset.json": text})


def model(name: str, path: str, **files: str) -> Case:
    return Case(
        name, f"plan job.yaml --set model.from_config={path}", {f"m/{key}.json": text for key, text in files.items()}
    )


OUTSIDE = '{"weight_map": {"a": "../secret.safetensors"}}'

CASES = [
    # the file
    Case("the spec is not there", "plan missing.yaml"),
    Case("the spec is a folder", "plan ."),
    spec("the spec is empty", (SPEC, "")),
    spec("the spec is a list", (SPEC, "- output_dir: run\n")),
    spec("the spec is one word", (SPEC, "hello\n")),
    Case("the spec is not UTF-8", "plan job.yaml", {"job.yaml": b"output_dir: " + b"\xff\xfe\n"}),
    Case("the spec is binary", "plan job.yaml", {"job.yaml": b"\x00\x01\x02"}),
    spec("a bracket is not closed", ("max_steps: 20}", "max_steps: 20")),
    spec("indented by a tab", ("  train: corpus.jsonl", "\ttrain: corpus.jsonl")),
    spec("a key is given twice", more="output_dir: other\n"),
    spec("a key of a section is given twice", ("max_steps: 20", "max_steps: 20, seq_len: 12")),
    spec("a tag that would build an object", ("output_dir: run", "output_dir: !!python/object/apply:os.getcwd []")),
    # keys
    spec("misspelt section", ("training:", "trainning:")),
    spec("misspelt key", ("global_batch_size", "globl_batch_size")),
    spec("misspelt key two levels down", ("vocab_size", "vocabsize")),
    spec("misspelt key of a shorthand section", ("task: causal_lm", "task: {nam: causal_lm}")),
    spec("a key like no other", more="zzz: 1\n"),
    spec("a key that is a number", more="7: 1\n"),
    spec("required section missing", ("task: causal_lm\n", "")),
    spec("required key missing", ("seq_len: 48, ", "")),
    spec("many mistakes at once", ("seq_len: 48", "seq_len: 0"), ("causal_lm", "casual_lm"), ("run", "''")),
    # types and values
    spec("a word for a number", ("seq_len: 48", "seq_len: long")),
    spec("a fraction for a count", ("seq_len: 48", "seq_len: 48.5")),
    spec("a boolean for a count", ("max_steps: 20", "max_steps: true")),
    spec("null for a count", ("global_batch_size: 8", "global_batch_size: null")),
    spec("a number in quotes", ("max_steps: 20", "max_steps: '20'")),
    spec("below the least value", ("max_steps: 20", "max_steps: -3")),
    spec("a learning rate that is a word", ("max_steps: 20", "max_steps: 20, lr: fast")),
    spec("a learning rate that is no number", ("max_steps: 20", "max_steps: 20, lr: .nan")),
    spec("a share above one", ("  train_tok", "  validation_fraction: 1.5\n  train_tok")),
    spec("a number for a path", ("output_dir: run", "output_dir: 7")),
    spec("an empty path", ("output_dir: run", "output_dir: ''")),
    spec("a list for a path", ("output_dir: run", "output_dir: [run]")),
    spec("an empty list of files", ("train: corpus.jsonl", "train: []")),
    spec("a number in a list of files", ("train: corpus.jsonl", "train: [corpus.jsonl, 3]")),
    spec("a word for a boolean", more="checkpoint: {asynchronous: sometimes}\n"),
    spec("a list for a section", ("training: {seq_len: 48, global_batch_size: 8, max_steps: 20}", "training: [48, 8]")),
    spec("null for a section", ("training: {seq_len: 48, global_batch_size: 8, max_steps: 20}", "training:")),
    spec("unknown task", ("causal_lm", "masked_ml")),
    # options of another task, or of none
    spec("an option of another task", ("task: causal_lm", "task: {name: causal_lm, labels: [a, b], doc_stride: 8}")),
    spec(
        "packing where there is nothing to pack",
        ("task: causal_lm", "task: chat"),
        ("data:\n", "data:\n  packing: none\n"),
    ),
    spec("a column that the task does not read", ("data:\n", "data:\n  columns: {txt: body, messages: chat}\n")),
    spec(
        "weights without names",
        ("task: causal_lm", "task: {name: sequence_classification, class_weights: [1, 2]}"),
    ),
    spec(
        "weights for other labels",
        ("task: causal_lm", "task: {name: sequence_classification, labels: [a, b, c], class_weights: [1, 2]}"),
    ),
    spec(
        "options that exclude each other",
        ("task: causal_lm", "task: {name: sequence_classification, multi_label: true, label_smoothing: 0.1}"),
    ),
    spec(
        "a threshold without what it is for",
        ("task: causal_lm", "task: {name: extractive_qa, null_threshold: 1, doc_stride: 48}"),
    ),
    spec(
        "a separator without several labels",
        ("task: causal_lm", "task: sequence_classification"),
        ("data:\n", "data:\n  label_separator: '|'\n"),
    ),
    spec("no share to hide", ("task: causal_lm", "task: {name: masked_lm, mask_probability: 0}")),
    spec("unknown strategy", ("precision: fp32", "strategy: zero4")),
    spec("unknown strategy as shorthand", ("parallel: {precision: fp32}", "parallel: fsdpp")),
    spec("a negative seed", more="seed: -1\n"),
    # what does not go together
    spec(
        "an optimiser that needs whole matrices",
        ("max_steps: 20", "max_steps: 20, optimizer: muon"),
        ("precision: fp32", "strategy: zero2"),
    ),
    spec("a setting of another optimiser", ("max_steps: 20", "max_steps: 20, momentum: 0.9")),
    spec("a setting of another schedule", ("max_steps: 20", "max_steps: 20, lr_power: 2")),
    spec(
        "an average that no engine keeps",
        ("max_steps: 20", "max_steps: 20, ema_decay: 0.99"),
        ("precision: fp32", "strategy: zero3"),
    ),
    spec(
        "an optimiser that is not of this machine",
        ("max_steps: 20", "max_steps: 20, optimizer: paged_adamw"),
        ("name: cluster.yaml", "name: cpu"),
    ),
    spec("frozen in two ways", more="method: {freeze_all_but_head: true, freeze_blocks: 1}\n"),
    spec("a tied head alone", more="method: {freeze_all_but_head: true}\n"),
    spec("an unknown score", more="evaluation: {every_steps: 5, metric: bleu}\n"),
    spec("patience for nothing", more="evaluation: {every_steps: 5, patience: 2}\n"),
    spec("two warm-ups", ("max_steps: 20", "max_steps: 20, warmup_steps: 2, warmup_ratio: 0.1")),
    # searches and stages
    spec("a sweep of nothing", command="sweep job.yaml"),
    spec(
        "a sweep from high to low",
        more="sweep: {parameters: {training.lr: {low: 1, high: 0.1}}}\n",
        command="sweep job.yaml",
    ),
    spec(
        "a sweep of a key that is none", more="sweep: {parameters: {training.lrr: [1, 2]}}\n", command="sweep job.yaml"
    ),
    spec(
        "a sweep for an unknown score",
        more="sweep: {parameters: {training.lr: [1, 2]}, metric: f1}\n",
        command="sweep job.yaml",
    ),
    spec("a range from high to low", command="lr-find job.yaml --from 1 --to 0.1"),
    spec("a stage that is not chosen", more="stages: [{name: one}, {name: two}]\n"),
    spec("a stage that is not there", more="stages: [{name: one}]\n", command="plan job.yaml --set stage=two"),
    spec("stages with one name", more="stages: [{name: one}, {name: one}]\n", command="launch job.yaml"),
    spec("stages on other machines", more="stages: [{name: one}]\n", command="launch job.yaml --via slurm"),
    # either, not both
    spec("neither max_steps nor num_epochs", (", max_steps: 20", "")),
    spec("both max_steps and num_epochs", ("max_steps: 20", "max_steps: 20, num_epochs: 1")),
    spec("neither model.path nor model.from_config", ("  from_config: {", "  # {"), ("model:", "model: {}")),
    spec("both model.path and model.from_config", ("model:\n", "model:\n  path: gpt2\n")),
    spec("both tokenizers", ("  train_tok", "  tokenizer: gpt2\n  train_tok")),
    # arithmetic
    spec("batch not a multiple of the ranks", ("global_batch_size: 8", "global_batch_size: 7")),
    spec("batch below the ranks", ("global_batch_size: 8", "global_batch_size: 1")),
    spec("batch not a multiple of micro-batch x ranks", ("precision: fp32", "micro_batch_size: 3")),
    spec("longer than the model's positions", ("seq_len: 48", "seq_len: 49")),
    # the model
    spec("unknown model_type", ("model_type: gpt2", "model_type: gtp2")),
    spec("a model_type like no other", ("model_type: gpt2", "model_type: ours")),
    spec("no model_type", ("model_type: gpt2, ", "")),
    spec("unknown config key", ("n_layer: 2", "n_layers: 2")),
    spec("config values that contradict", ("n_head: 2", "n_head: 5")),
    spec("a width that is a word", ("n_embd: 32", "n_embd: wide")),
    Case("model folder is not there", "plan job.yaml --set 'model={path: ./nowhere}'"),
    Case("model folder without config.json", "plan job.yaml --set 'model={path: ./m}'", {"m/notes.json": "{}"}),
    Case("model file is cut short", "plan job.yaml --set 'model={path: ./m}'", {"m/config.json": '{"model_type": "gp'}),
    Case(
        "model of an unknown type",
        "plan job.yaml --set 'model={path: ./m}'",
        {"m/config.json": '{"model_type": "ours"}'},
    ),
    model("config file is not there", "./nowhere/config.json"),
    model("config folder without config.json", "m", notes="{}"),
    model("config file is cut short", "m", config='{"model_type": "gpt2"'),
    model("config file is a list", "m", config="[]"),
    spec(
        "an architecture without this head",
        (
            "from_config: {model_type: gpt2, n_layer: 2, n_embd: 32, n_head: 2, n_positions: 48}",
            "from_config: {model_type: vit}",
        ),
    ),
    # the machines
    spec("unknown cluster", ("name: cluster.yaml", "name: a100")),
    spec("cluster file is not there", ("name: cluster.yaml", "name: ./site.yaml")),
    spec("no nodes", ("gpus_per_node: 2", "nodes: 0")),
    cluster("memory of a cluster below nothing", ("memory_gib: 16", "memory_gib: -16")),
    cluster("memory of a cluster in words", ("memory_gib: 16", "memory_gib: 16 GB")),
    cluster("memory of a cluster beyond reason", ("memory_gib: 16", "memory_gib: 16000000")),
    cluster("misspelt key of a cluster", ("context_gib", "contex_gib")),
    cluster("a figure without a source", ("  gpu.bf16: data sheet\n", "")),
    cluster("an unknown kind of accelerator", ("kind: cuda", "kind: tpu")),
    cluster("a context above the memory", ("context_gib: 1", "context_gib: 20")),
    cluster("a bandwidth in bytes", ("memory_gb_per_s: 1555", "memory_gb_per_s: 1555e9")),
    cluster("a peak in the wrong unit", ("peak_bf16_tflops: 312", "peak_bf16_tflops: 312e12")),
    cluster("a link beyond reason", ("intra_node_gb_per_s: 300", "intra_node_gb_per_s: 1e6")),
    cluster("a link of nothing", ("inter_node_gb_per_s: 25", "inter_node_gb_per_s: 0")),
    cluster("a share in percent", ("matmul_share: 0.8", "matmul_share: 80")),
    cluster("half precision slower than fp32", ("peak_fp32_tflops: 19.5", "peak_fp32_tflops: 400")),
    cluster("a price below nothing", ("sources:", "price_per_gpu_hour: -2\nsources:")),
    cluster("a price without a source", ("sources:", "price_per_gpu_hour: 2\nsources:")),
    cluster("a figure is missing", (", launch_us: 5", "")),
    cluster("a section is missing", ("link: {intra_node_gb_per_s: 300, ", "lnk: {intra_node_gb_per_s: 300, ")),
    cluster("NVMe without its rate", ("host: {", "host: {nvme_gib: 7000, ")),
    cluster("an empty source", ("gpu.bf16: data sheet", "gpu.bf16: ''")),
    cluster("a source of no figure", ("gpu.bf16: data sheet", "gpu.bf16: data sheet\n  gpu.bf17: data sheet")),
    site("base of no name", "base: 3"),
    site("base that is not there", "base: a100"),
    site("base of itself", "base: ./site.yaml"),
    site("bases in a circle", "base: ./other.yaml", other="base: ./site.yaml"),
    site("an override without a source", "base: h100-80\nlink: {inter_node_gb_per_s: 12.5}"),
    site(
        "an override beyond reason",
        "base: h100-80\nlink: {inter_node_gb_per_s: 1e6}\nsources: {link.inter_node_gb_per_s: us}",
    ),
    site("an override of an unknown key", "base: h100-80\nlink: {inter_node: 12.5}"),
    cluster("nothing fits", ("memory_gib: 16", "memory_gib: 1.0001")),
    Case(
        "nothing fits, with fixed choices",
        "plan job.yaml --set parallel.strategy=ddp --set parallel.micro_batch_size=4",
        {"cluster.yaml": CLUSTER.replace("memory_gib: 16", "memory_gib: 1.0001")},
    ),
    # presets
    preset("preset with a derived key", '{"train_batch_size": 64}'),
    preset(
        "preset with derived keys of the ZeRO section", '{"zero_optimization": {"stage": 3, "reduce_bucket_size": 1}}'
    ),
    preset("preset with an unknown key", '{"zero_optimization": {"overlap_com": true}}'),
    preset("preset with a key like no other", '{"zzz": 1}'),
    preset("preset with auto", '{"zero_optimization": {"overlap_comm": "auto"}}'),
    preset("preset that is not JSON", "{overlap: 1"),
    preset("preset that is a list", "[]"),
    preset("preset whose ZeRO section is a word", '{"zero_optimization": "fast"}'),
    preset("preset without effect: fsdp", "{}", strategy="fsdp"),
    preset("preset without effect: auto", "{}", strategy="auto"),
    Case("unknown preset", "plan job.yaml --set parallel=zero2 --set parallel.deepspeed_preset=zero9 --emit out"),
    Case("unknown preset without --emit", "plan job.yaml --set parallel=zero2 --set parallel.deepspeed_preset=zero9"),
    # --set
    Case("--set without a value", "plan job.yaml --set training.lr"),
    Case("--set without a key", "plan job.yaml --set =3"),
    Case("--set with an empty part", "plan job.yaml --set training..lr=3"),
    Case("--set of an unknown key", "plan job.yaml --set training.learning_rate=1e-4"),
    Case("--set inside a value", "plan job.yaml --set output_dir.x=1"),
    Case("--set that is not YAML", "plan job.yaml --set 'output_dir=[1'"),
    Case("--set of a wrong type", "plan job.yaml --set training.max_steps=soon"),
    # the command line itself
    Case("unknown command", "plann job.yaml"),
    Case("unknown option", "plan job.yaml --emitt out"),
    Case("no spec", "plan"),
    Case("an option without its value", "plan job.yaml --set"),
    Case("init with an unknown task", "init new.yaml --task translation"),
    Case("init over a file", "init job.yaml"),
    Case("init with GPUs of no kind", "init new.yaml --gpus 8"),
    Case("a key by another trainer's name", "explain-key training.learning_rate"),
    Case("a misspelt key to explain", "explain-key parallel.startegy"),
    Case("a key that there is not", "explain-key zzz"),
    Case("emit over a file of the user's", "plan job.yaml --emit out", {"out/plan.json": "mine"}),
    Case("prepare with a bad spec", "prepare job.yaml --set seed=x"),
    Case("launch with a bad spec", "launch job.yaml --set seed=x"),
    Case("launch on many nodes", "launch job.yaml --set cluster.nodes=2"),
    Case("launch on hosts named twice", "launch job.yaml --set cluster.nodes=2 --hosts n1,n1"),
    Case("launch on a host that is an option", "launch job.yaml --set cluster.nodes=2 --hosts n1,-oProxyCommand=x"),
    Case("launch on other hosts than planned", "launch job.yaml --hosts n1,n2,n3 --set cluster.nodes=2"),
    Case("hostfile is not there", "launch job.yaml --hostfile nowhere"),
    Case(
        "hostfile with many mistakes", "launch job.yaml --hostfile h", {"h": "n1 slots=2\nn1 slots=2\nn2 slots=0\nn3\n"}
    ),
    Case("hostfile of uneven machines", "launch job.yaml --hostfile h", {"h": "n1 slots=2\nn2 slots=1\n"}),
    Case("hostfile that names nobody", "launch job.yaml --hostfile h", {"h": "# n1 slots=2\n"}),
    Case("include of an unknown host", "launch job.yaml --hostfile h --include n7", {"h": "n1 slots=2\n"}),
    Case("exclude of everyone", "launch job.yaml --hostfile h --exclude n1", {"h": "n1 slots=2\n"}),
    Case("include without hosts", "launch job.yaml --include n1"),
    Case("hosts and a hostfile", "launch job.yaml --hosts n1 --hostfile h", {"h": "n1 slots=2\n"}),
    Case("an environment variable that is none", "launch job.yaml --set cluster.nodes=2 --hosts n1,n2 --export 'A B'"),
    Case(
        "more nodes at the least than at all",
        "launch job.yaml --set cluster.nodes=2 --hosts n1,n2 --set launch.min_nodes=3",
    ),
    Case("an array without Slurm", "launch job.yaml --array seed=1,2"),
    Case("an array of nothing", "launch job.yaml --via slurm --array seed"),
    Case("an array of output folders", "launch job.yaml --via slurm --array output_dir=a,b"),
    Case("an array and a chain", "launch job.yaml --via slurm --array seed=1,2 --chain m"),
    Case(
        "a time limit below one checkpoint",
        "launch job.yaml --via slurm",
        {"cluster.yaml": CLUSTER + "slurm: {time: '2'}\n"},
    ),
    Case(
        "a venv and a container",
        "launch job.yaml --via slurm",
        {"cluster.yaml": CLUSTER + "slurm: {venv: /a, container: {image: b}}\n"},
    ),
    Case(
        "a secret in the site file",
        "launch job.yaml --via slurm",
        {"cluster.yaml": CLUSTER + "slurm: {environment: {HF_TOKEN: x}}\n"},
    ),
    Case("a manifest without an image", "launch job.yaml --via kubernetes"),
    Case("status of no run", "status nowhere"),
    Case("doctor writes no other file", "doctor --write-cluster here.txt"),
    Case("doctor over a file", "doctor --write-cluster cluster.yaml"),
    Case("doctor into a folder that is not there", "doctor --write-cluster new/here.yaml"),
    Case("doctor of an unknown device", "doctor --write-cluster here.yaml --device tpu"),
    Case("doctor of no disk", "doctor --write-cluster here.yaml --nvme ./nowhere"),
    # checkpoints
    Case("convert what is not there", "convert missing dcp:out"),
    Case("convert to no format", "convert missing tensorflow:out"),
    Case("convert over something", "convert job.yaml dcp:job.yaml"),
    Case("convert to ONNX", "convert missing onnx:out"),
    Case("convert no checkpoint", "convert m dcp:out", {"m/a.txt": "a"}),
    Case("convert with an option of another format", "convert missing torch:out --ranks 2"),
    Case("convert with a stage twice", "convert missing zero:out --strategy zero2 --stage 2"),
    Case("convert with names in no JSON", "convert missing dcp:out --rename job.yaml"),
    Case("convert to no size", "convert missing hf:out --shard-size big"),
    Case("convert an index that points outside", "convert hf:m torch:out", {"m/model.safetensors.index.json": OUTSIDE}),
    Case("convert a file cut short", "convert hf:m torch:out", {"m/model.safetensors": b"\x08\0\0\0\0\0\0\0{"}),
    Case("inspect what is not there", "inspect missing"),
    Case("eval without data", "eval model"),
    Case("eval of no model", "eval nowhere --task perplexity --data job.yaml"),
    Case("eval with an option of another task", "eval model --task cloze --data a.jsonl --stride 4"),
    Case("eval by the harness with data of ours", "eval model --harness arc --data a.jsonl"),
    Case("eval with a column that the task does not read", "eval model --task cloze --data a.jsonl --column gold=x"),
    Case("explain of no model", "explain nowhere --text fine"),
    Case("launch of what does not fit", "launch job.yaml --set cluster.name=none"),
]


class Outcome(NamedTuple):
    output: str
    """Standard output and error together."""
    code: object
    left_behind: set[str]
    """Files written, altered or removed."""


def run(argv: list[str]) -> tuple[str, object]:
    """(output, exit code); an exception that is none of ours is a traceback and exit code 1, as Python would have it."""
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        try:
            cli.main(argv)
        except SystemExit as left:
            return screen.getvalue(), left.code
        except Exception:  # noqa: BLE001 - it is the test's finding
            return screen.getvalue() + traceback.format_exc(), 1
    raise AssertionError("main always leaves")


@contextlib.contextmanager
def folder_of(case: Case, root: Path) -> Iterator[Path]:
    """The working directory of a case: its files, and the good ones where it has none of its own."""
    folder = root / str(len(list(root.iterdir())))
    for name, content in {"job.yaml": SPEC, "cluster.yaml": CLUSTER, **case.files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = Path.cwd()
    os.chdir(folder)  # so that messages show the names a user would have typed
    try:
        yield folder
    finally:
        os.chdir(before)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    root = tmp_path_factory.mktemp("cases")
    found = {}
    with pytest.MonkeyPatch.context() as patch, measured_here():
        patch.setenv("COLUMNS", "100")
        for case in CASES:
            with folder_of(case, root) as folder:
                before = contents(folder)
                output, code = run(shlex.split(case.argv))
                changed = {name for name, _ in before.items() ^ contents(folder).items()}
                found[case.name] = Outcome(output.replace(f"{folder}/", ""), code, changed)
    return found


def test_the_good_spec_is_good(tmp_path: Path) -> None:
    """Each case differs from it in one thing, so that thing is what is refused."""
    with folder_of(Case("good", ""), tmp_path), measured_here():
        output, code = run(["plan", "job.yaml"])
    assert (code, output.split()[0]) == (0, "plan")


def ours(output: str) -> str:
    """Without the words of libraries, which change with their releases: what they say in brackets, and typer's usage."""
    if not output.startswith("error: "):
        return "(what typer says of a command line)"
    return re.sub(rf"({FOREIGN}) \(.*\);", r"\1 (...);", output.rstrip())


def test_messages(outcomes: dict[str, Outcome], golden: Golden) -> None:
    """All of them, word by word."""
    blocks = [
        f"# {case.name}\n$ fleetune {case.argv}\n{ours(outcome.output)}\n[exit code {outcome.code}]\n"
        for case, outcome in ((case, outcomes[case.name]) for case in CASES)
    ]
    golden.check("messages.txt", "\n".join(blocks))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_mistake_is_the_users_and_is_told_in_words(case: Case, outcomes: dict[str, Outcome]) -> None:
    """Exit code 2, no traceback, nothing written; in our own messages each line has a path, a rule and a way out."""
    output, code, left_behind = outcomes[case.name]
    assert (code, left_behind) == (2, set())
    assert "Traceback" not in output
    if output.startswith("error: "):
        for line in output.removeprefix("error: ").splitlines():
            path, colon, rest = line.partition(": ")
            rule, semicolon, way_out = rest.rpartition("; ")
            assert (colon, semicolon) == (": ", "; ")
            assert path
            assert rule
            assert way_out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unknown command", ["Usage: fleetune", "'plann'"]),
        ("unknown option", ["Usage: fleetune plan", "--emitt"]),
        ("no spec", ["Usage: fleetune plan", "SPEC"]),
        ("an option without its value", ["--set", "argument"]),
        ("a bracket is not closed", ["job.yaml:9: ", "expected ',' or '}'"]),
        ("a key is given twice", ["job.yaml:11: ", "key 'output_dir' is given twice"]),
        ("config values that contradict", ["32", "5"]),
        ("a width that is a word", ["n_embd", "'wide'"]),
    ],
)
def test_the_words_of_libraries_are_shown(name: str, words: list[str], outcomes: dict[str, Outcome]) -> None:
    """Left out of the golden file, but not of what a user sees."""
    assert [word for word in words if word not in outcomes[name].output] == []


def test_each_case_has_its_own_name() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
