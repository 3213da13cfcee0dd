"""The layouts of ZeRO that a two-rank run on a CPU does not produce, built by hand as DeepSpeed 0.19.8 writes them."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.errors import CheckpointError
from launcher.stored.zero import ZeroSource

SHAPES = [{"a.weight": (5, 3), "b.weight": (7,)}, {"a.bias": (3,), "scale": ()}]
GROUPS = [{name: torch.randn(shape) for name, shape in group.items()} for group in SHAPES]
WEIGHTS = {name: tensor for group in GROUPS for name, tensor in group.items()}


def sizes(group: dict[str, torch.Tensor]) -> OrderedDict[str, torch.Size]:
    return OrderedDict((name, tensor.shape) for name, tensor in group.items())


def save_zero12(folder: Path, ranks: int, gap: int = 0, **model: Any) -> Path:
    """Stage 2: each group one vector, `gap` elements after each parameter, cut evenly, the final padding cut off."""
    vectors = []
    for group in GROUPS:
        vector = torch.cat([torch.cat([tensor.reshape(-1), torch.full((gap,), 9e9)]) for tensor in group.values()])
        vectors.append(torch.cat([vector, torch.full((-len(vector) % ranks,), 7e7)]).chunk(ranks))
    folder.mkdir()
    for rank in range(ranks):
        state = {
            "zero_stage": 2, "partition_count": [ranks, ranks],
            "single_partition_of_fp32_groups": [pieces[rank].clone() for pieces in vectors],
            "param_alignment_paddings": [[gap] * len(group) for group in GROUPS],
        }  # fmt: skip
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    shapes = [sizes(group) for group in GROUPS]
    module = {name: tensor.bfloat16() for name, tensor in WEIGHTS.items()}
    states = {"param_shapes": shapes, "module": module, "shared_params": {}, "buffer_names": [], **model}
    torch.save(states, folder / "mp_rank_00_model_states.pt")
    return folder


def save_zero3(folder: Path, ranks: int, cuts: int, frozen: dict[str, torch.Tensor] | None = None) -> Path:
    """Stage 3: pieces of ceil(numel / ranks), a rank's flat vector cut once more into `cuts` groups anywhere."""
    folder.mkdir()
    frozen = frozen or {}
    for rank in range(ranks):
        flat = torch.cat([piece(tensor, rank, ranks) for tensor in WEIGHTS.values()])
        state = {"zero_stage": 3, "partition_count": ranks, "fp32_flat_groups": [t.clone() for t in flat.chunk(cuts)]}
        torch.save({"optimizer_state_dict": state}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        model = {
            "param_shapes": [sizes(group) for group in GROUPS], "module": {"steps": torch.tensor(4)},
            "buffer_names": ["steps"], "shared_params": {}, "frozen_param_shapes": sizes(frozen),
            "frozen_param_fragments": {name: piece(tensor, rank, ranks) for name, tensor in frozen.items()},
        }  # fmt: skip
        torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    return folder


def piece(tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    step = math.ceil(tensor.numel() / ranks)
    padded = torch.cat([tensor.reshape(-1), torch.full((step * ranks - tensor.numel(),), -1.0, dtype=tensor.dtype)])
    return padded[rank * step : (rank + 1) * step].clone()


def assert_weights(source: ZeroSource) -> None:
    for name, tensor in WEIGHTS.items():
        assert torch.equal(source.read(name), tensor), name
    for record in source.records():
        record.check()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 11])
@pytest.mark.parametrize("gap", [0, 1, 6])
def test_stages_1_and_2_at_any_world_size_and_alignment(tmp_path: Path, ranks: int, gap: int) -> None:
    """Also with more ranks than a parameter has elements, and rank 10 after rank 9."""
    assert_weights(ZeroSource(save_zero12(tmp_path / "tag", ranks, gap)))


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 11])
@pytest.mark.parametrize("cuts", [1, 2, 3])
def test_stage_3_at_any_world_size_and_number_of_groups(tmp_path: Path, ranks: int, cuts: int) -> None:
    """A parameter may lie across two of a rank's groups."""
    frozen = {"frozen": torch.randn(3, 5), "half": torch.randn(4).bfloat16()}
    source = ZeroSource(save_zero3(tmp_path / "tag", ranks, cuts, frozen))
    assert_weights(source)
    for name, tensor in frozen.items():
        assert torch.equal(source.read(name), tensor), name
    assert source.read("steps") == 4


def test_what_no_optimizer_holds_comes_from_the_module(tmp_path: Path) -> None:
    """Buffers keep their type; a frozen parameter that stage 1 lists nowhere is found; strides are honoured."""
    module = {**WEIGHTS, "count": torch.tensor(3), "frozen": torch.randn(4, 6).t(), "b.tied": WEIGHTS["b.weight"]}
    shared = {"b.tied": "b.weight"}
    source = ZeroSource(save_zero12(tmp_path / "tag", 2, module=module, shared_params=shared, buffer_names=["count"]))
    assert_weights(source)
    assert torch.equal(source.read("frozen"), module["frozen"])
    assert source.read("count").dtype == torch.int64
    assert source.aliases == shared
    assert "b.tied" not in source.tensors


def remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def add(name: str) -> Any:
    return lambda folder: (folder / name).write_bytes(b"")


def shrink(folder: Path) -> None:
    file = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    state = torch.load(file, weights_only=True)
    groups = state["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    groups[0] = groups[0][:1]
    torch.save(state, file)


OPTIM, UNIVERSAL = "zero_pp_rank_{}_mp_rank_00_optim_states.pt", "; use DeepSpeed's ds_to_universal.py"
FINISHED = "; take a checkpoint that every rank finished, or copy the missing files from where it was written"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(OPTIM.format(1)), f"was saved by 3 ranks, but the optimizer file of rank 1 is missing{FINISHED}"),
        (remove(OPTIM.format(2)), f"was saved by 3 ranks, but the optimizer file of rank 2 is missing{FINISHED}"),
        (add(OPTIM.format(3)), "/zero_pp_rank_3_mp_rank_00_optim_states.pt: was cut short or damaged"),
        (remove("mp_rank_00_model_states.pt"), f"lacks mp_rank_00_model_states.pt{FINISHED}"),
        (add("zero_pp_rank_0_mp_rank_01_optim_states.pt"), f"belongs to tensor parallelism{UNIVERSAL}"),
        (add("layer_00-model_00-model_states.pt"), f"belongs to pipeline or expert parallelism{UNIVERSAL}"),
        (shrink, "ends before parameter"),
    ],
)
def test_folders_that_would_give_wrong_weights_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    folder = save_zero12(tmp_path / "tag", 3)
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        ZeroSource(folder)
    assert message in str(caught.value)


def test_files_left_by_a_larger_run_are_noticed(tmp_path: Path) -> None:
    larger, folder = save_zero12(tmp_path / "four", 4), save_zero12(tmp_path / "three", 3)
    (larger / OPTIM.format(3)).rename(folder / OPTIM.format(3))
    with pytest.raises(CheckpointError, match="was saved by 3 ranks, but holds 4 optimizer files"):
        ZeroSource(folder)
