"""Real checkpoints of DeepSpeed and FSDP2, saved by two ranks, come out as the weights that the ranks held."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tools.convert import convert

ZERO = [f"zero{stage}-{model}" for stage in (1, 2, 3) for model in ("gpt2", "llama", "bert", "bert_frozen")]
BF16 = ["zero2_bf16-gpt2", "zero3_bf16-gpt2"]
FSDP = ["fsdp-gpt2", "fsdp-llama", "fsdp-bert", "fsdp_plain-llama"]


def truth_of(saved: Path, case: str) -> dict[str, torch.Tensor]:
    return load_file(saved / "truth" / f"{case}.safetensors")


def written_by_convert(saved: Path, case: str, out: Path, **options: object) -> dict[str, torch.Tensor]:
    engine, model = case.split("-")
    result = convert(
        str(saved / engine / model), f"hf:{out}", config_dir=saved / "config" / model, shard_size_bytes=9000, **options
    )
    tensors = {name: value for file in sorted(out.glob("*.safetensors")) for name, value in load_file(file).items()}
    assert (len(tensors), len(list(out.glob("*.safetensors")))) == (result.num_tensors, result.num_files)
    return tensors


@pytest.mark.parametrize("case", ZERO + FSDP)
def test_weights_are_those_that_the_ranks_held_and_transformers_opens_them(
    saved: Path, case: str, tmp_path: Path
) -> None:
    """Bit for bit; nothing missing, unexpected or mismatched; the same logits as the live model."""
    truth = truth_of(saved, case)
    written = written_by_convert(saved, case, tmp_path / "out")
    assert set(truth) - set(written) == ({"lm_head.weight"} if "gpt2" in case else set())
    for name, value in written.items():
        assert torch.equal(value, truth[name]), name

    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    kind = getattr(transformers, config.architectures[0])
    opened, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    live = kind(config).eval()
    live.load_state_dict(truth)
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(opened.eval()(input_ids=ids).logits, live(input_ids=ids).logits)


@pytest.mark.parametrize("case", ZERO + BF16)
def test_zero_agrees_with_deepspeeds_own_conversion(saved: Path, case: str, tmp_path: Path) -> None:
    """In bf16 training, too, the fp32 masters are taken and not the rounded weights."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    engine, model = case.split("-")
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(saved / engine / model))
    ours = written_by_convert(saved, case, tmp_path / "out")
    absent = {name for name in ours if name not in theirs}
    assert not absent or case == "zero1-bert_frozen", absent  # their tool loses frozen parameters of stage 1
    assert all(name.startswith("bert.embeddings.") for name in absent)
    for name in ours.keys() - absent:
        assert torch.equal(ours[name], theirs[name]), name


def test_bf16_on_demand(saved: Path, tmp_path: Path) -> None:
    """--dtype bf16 rounds every weight once and says so in config.json, so that it is opened in bf16."""
    written = written_by_convert(saved, "zero3-llama", tmp_path / "out", dtype="bf16")
    for name, value in truth_of(saved, "zero3-llama").items():
        assert torch.equal(written[name], value.bfloat16()), name
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_missing_rank_of_a_real_checkpoint_is_named(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved / "zero3" / "llama", copy)
    (copy / "global_step1" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(Exception, match="saved by 2 ranks, but the optimizer file of rank 1 is missing"):
        convert(f"zero:{copy}", f"hf:{tmp_path / 'out'}", config_dir=saved / "config" / "llama")
    assert not (tmp_path / "out").exists()
