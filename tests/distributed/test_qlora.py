"""QLoRA: adapters beside weights in 4 bits, on two ranks: the loss curve of peft and bitsandbytes in one process.

Runs where bitsandbytes is installed (`pip install 'fleetune[bitsandbytes]'`); its kernels for CPUs are enough.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml

from launcher.data.order import GlobalOrder
from launcher.data.prepare import prepare
from launcher.job import parse_spec
from tests.distributed.test_parity import RANKS, _batch
from tests.support import job, records, run_ranks, torchrun
from tools.convert import convert

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
STEPS = 8


def raw_job(root: Path, corpus: Path) -> dict[str, Any]:
    parallel = {"strategy": "ddp", "micro_batch_size": 2, "recompute": "none", "precision": "fp32"}
    raw = job(root / "run", corpus, "gpt", parallel=parallel, data__prepared=str(root / "data"))
    raw |= {"method": {"name": "qlora", "r": 4, "lora_alpha": 8.0}, "checkpoint": {"every_steps": 4}}
    raw["training"] |= {"max_steps": STEPS, "lr": 1e-2}
    raw["model"] = {"path": str(root / "base")}
    return raw


@pytest.fixture(scope="module")
def root(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with weights, and a run beside it."""
    root = tmp_path_factory.mktemp("qlora")
    prepare(parse_spec(raw_job(root, corpus)))
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    torch.manual_seed(4)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=400, **sizes)).save_pretrained(root / "base")
    (root / "job.yaml").write_text(yaml.safe_dump(raw_job(root, corpus)))
    train(root)
    return root


def train(root: Path) -> None:
    assert run_ranks(torchrun(2, RANKS, root / "job.yaml"), root / "log") == 0, (root / "log").read_text()[-6000:]


def quantised(root: Path) -> Any:
    told = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **told)
    return transformers.AutoModelForCausalLM.from_pretrained(
        root / "base", quantization_config=config, dtype=torch.float32, pad_token_id=3
    )


def test_losses_follow_one_plain_process(root: Path, corpus: Path) -> None:
    import datasets

    spec, data = parse_spec(raw_job(root, corpus)), datasets.load_from_disk(str(root / "data"))["train"]
    torch.manual_seed(spec.seed)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(quantised(root), lora, autocast_adapter_dtype=False).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)
    schedule = transformers.get_scheduler("cosine", optimizer, 3, STEPS)
    order, losses = GlobalOrder(len(data), spec.seed), []
    for step in range(STEPS):
        loss = model(**_batch([data[int(i)] for i in order.samples(8 * step, 8)], "gpt")).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for one in (optimizer, schedule):
            one.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    ours = [record["loss"] for record in records(root / "run")]
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, losses, strict=True))
    print(f"parity qlora ddp: worst relative difference {worst:.1e}")
    assert worst < 1e-4
    assert losses[0] - losses[-1] > 0.1


def test_a_checkpoint_holds_adapters_alone_and_is_gone_on_from(root: Path, tmp_path: Path) -> None:
    """From step 4 to 8 again, bit for bit; as a PEFT folder it opens beside the base."""
    straight = [record["loss"] for record in records(root / "run")]
    last = root / "run" / "checkpoints" / f"step-{STEPS:08d}"
    assert sum(file.stat().st_size for file in (last / "dcp").iterdir()) < 16 * 4 * 2 * 2 * 7 * 4 * (64 + 128)
    convert(str(root / "run"), f"hf:{tmp_path / 'adapter'}")
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert any(value.abs().max() > 0 for name, value in opened.named_parameters() if "lora_B" in name)
    shutil.rmtree(last)
    train(root)
    assert [record["loss"] for record in records(root / "run")] == straight
