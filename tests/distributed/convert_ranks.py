"""What the ranks of test_convert do: plain DeepSpeed and FSDP2 scripts that train one step, save, and tell the truth.

Started as `torchrun --nproc-per-node 2 convert_ranks.py OUT`. Writes `OUT/<engine>/<model>/` as the library saves it,
`OUT/config/<model>/` and `OUT/truth/<engine>-<model>.safetensors`, the full state dict gathered from the live model, and
`OUT/moments/...`, what its optimiser holds, as `<parameter>/<state>`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.distributed.checkpoint import save as save_dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCAB = 61  # odd, like the widths below: no partition is even


def make_model(name: str) -> torch.nn.Module:
    """Tiny models: `gpt2` is tied, `llama` is not, `bert` has a buffer-free head and, when `frozen`, dead embeddings.

    Without dropout: a plain loop in one process can follow them.
    """
    torch.manual_seed(0)
    if name.startswith("gpt2"):
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=18, n_layer=2, n_head=2, n_positions=33, **off))
        return get_peft_model(model, LoraConfig(r=3, target_modules=["c_attn"])) if name == "gpt2_lora" else model
    if name == "llama":
        sizes = {"hidden_size": 20, "intermediate_size": 35, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=False, **sizes))
    sizes = {"hidden_size": 18, "intermediate_size": 33, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 40}
    model = BertForSequenceClassification(BertConfig(vocab_size=VOCAB, num_labels=3, **sizes))
    if name == "bert_frozen":
        model.bert.embeddings.requires_grad_(False)
    return model


def batch(name: str) -> dict[str, torch.Tensor]:
    ids = (torch.arange(20).reshape(2, 10) * 7 + dist.get_rank()) % VOCAB
    return {"input_ids": ids, "labels": torch.tensor([0, 2]) if name.startswith("bert") else ids}


def param_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Two groups, as everybody trains: no weight decay on biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    flat = [p for p in trained if p.ndim < 2]
    return [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}]


def gathered(module: torch.nn.Module, stage: int) -> dict[str, torch.Tensor]:
    import deepspeed

    if stage < 3:
        return {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moments_3(engine: Any) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_optimizer_state

    trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    states = ("exp_avg", "exp_avg_sq")
    return {f"{name}/{key}": safe_get_full_optimizer_state(p, key) for name, p in trained for key in states}


def moments_12(engine: Any) -> dict[str, torch.Tensor]:
    """DeepSpeed's own means need a state that torch's AdamW had before its first step; so the live vectors are joined."""
    zero, found = engine.optimizer, {}
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            mine = zero.optimizer.state[flat][key]
            pieces = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(pieces, mine)
            joined, at = torch.cat(pieces), 0
            for parameter in group:
                values = joined[at : at + parameter.numel()].reshape(parameter.shape)
                found[f"{engine.param_names[parameter]}/{key}"] = values
                at += parameter.numel()
    return found


def run_zero(out: Path, name: str, stage: int, bf16: bool = False) -> None:
    import deepspeed

    model, engine_name = make_model(name), f"zero{stage}{'_bf16' if bf16 else ''}"
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "gradient_clipping": 0.0,
    }
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for a minute, and is not used
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.backward(engine(**batch(name)).loss)
    engine.step()
    engine.save_checkpoint(str(out / engine_name / name))
    truth = gathered(engine.module, stage)
    write_truth(out / "truth", engine_name, name, truth)
    moments = moments_3(engine) if stage == 3 else moments_12(engine)
    write_truth(out / "moments", engine_name, name, moments)
    engine.destroy()


def run_fsdp(out: Path, name: str, wrapped: bool) -> None:
    model = make_model(name)
    for module in [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]:
        for block in module:
            fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    model(**batch(name)).loss.backward()
    optimizer.step()
    state: dict[str, Any] = get_model_state_dict(model)
    if wrapped:
        state = {"model": state, "optim": get_optimizer_state_dict(model, optimizer)}
    engine_name = "fsdp" if wrapped else "fsdp_plain"
    save_dcp(state, checkpoint_id=out / engine_name / name)
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    write_truth(out / "truth", engine_name, name, get_model_state_dict(model, options=full))
    states = get_optimizer_state_dict(model, optimizer, options=full).get("state", {})
    moments = {
        f"{key}/{state}": value for key, one in states.items() for state, value in one.items() if state != "step"
    }
    write_truth(out / "moments", engine_name, name, moments)


def write_truth(folder: Path, engine: str, name: str, state: dict[str, torch.Tensor]) -> None:
    if dist.get_rank() == 0:
        truth = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}
        save_file(truth, folder / f"{engine}-{name}.safetensors")


def main(out: Path) -> None:
    os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]  # what the deepspeed launcher would set
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        for folder in ("truth", "moments"):
            (out / folder).mkdir(parents=True)
        for name in ("gpt2", "llama", "bert", "bert_frozen"):
            model = make_model(name)
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(out / "config" / name)
    dist.barrier()
    for name in ("gpt2", "llama", "bert", "bert_frozen", "gpt2_lora"):
        run_fsdp(out, name, wrapped=True)
    run_fsdp(out, "llama", wrapped=False)
    for stage in (1, 2, 3):
        for name in ("gpt2", "llama", "bert", "bert_frozen", "gpt2_lora"):
            run_zero(out, name, stage)
    run_zero(out, "gpt2", 2, bf16=True)
    run_zero(out, "gpt2", 3, bf16=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
