"""The optimiser's parameter groups, and the optimisers themselves, each from the library that `optimisers.py` names."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch

from launcher.cost.architecture import blocks_of
from launcher.job.optimisers import OPTIMISERS
from launcher.job.spec import TrainingSection

Group = dict[str, Any]
"""`params`, `weight_decay`, and `lr_share`: its learning rate as a share of the step's, taken out by the engine."""


def parameter_groups(model: Any, training: TrainingSection) -> list[Group]:
    """One group for each pair of learning rate and weight decay; empty ones are left out, since DeepSpeed trips over them.

    Weight decay on matrices and embeddings, none on biases and norms (vectors), nor on what `no_decay` names.
    """
    groups: dict[tuple[float, bool], Group] = {}
    shares = layer_shares(model, training.layer_lr_decay)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        share, is_decayed = shares.get(name, 1.0), decays(name, parameter, training)
        weight_decay = training.weight_decay if is_decayed else 0.0
        new = {"params": [], "weight_decay": weight_decay, "lr_share": share}
        groups.setdefault((share, not is_decayed), new)["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: (-key[0], key[1]))]


def decays(name: str, parameter: torch.Tensor, training: TrainingSection) -> bool:
    num_axes = len(getattr(parameter, "ds_shape", parameter.shape))  # of the whole, also where ZeRO-3 has cut it up
    return num_axes >= 2 and not any(fnmatchcase(name, pattern) for pattern in training.no_decay)


def layer_shares(model: Any, decay: float) -> dict[str, float]:
    """Learning rate of each parameter as a share of the head's: decay^(layers above it), as ELECTRA and BEiT have it.

    What stands before the blocks (embeddings) is the lowest layer, what stands behind them (norm, pooler, head) the top.
    """
    return {name: decay**depth for name, depth in depths(model).items()} if decay < 1.0 else {}


def depths(model: Any) -> dict[str, int]:
    """Layers above each parameter: 0 of the head, 1 of the last block, most of the embeddings."""
    blocks = blocks_of(model)
    layer_of = {id(p): number for number, block in enumerate(blocks, start=1) for p in block.parameters()}
    found, behind = {}, False
    for name, parameter in model.named_parameters():
        layer = layer_of.get(id(parameter))
        behind = behind or layer is not None
        found[name] = len(blocks) + 1 - layer if layer is not None else 0 if behind else len(blocks) + 1
    return found


def take_shares(groups: list[Group]) -> list[float]:
    """The groups' shares of the learning rate, out of the groups: a checkpoint that is loaded cannot alter them."""
    return [group.pop("lr_share") for group in groups]


def make_optimizers(model: Any, training: TrainingSection, device: torch.device) -> tuple[list[Any], list[float]]:
    """The spec's optimiser over a model's trained parameters: one, or for muon two; and a share of the learning rate
    for each of their groups, in order."""
    groups = parameter_groups(model, training)
    if training.optimizer != "muon":
        shares = take_shares(groups)
        return [make_optimizer(groups, training, device)], shares
    in_blocks = {id(p) for block in blocks_of(model) for p in block.parameters() if p.ndim == 2}
    matrices, others = (_part(groups, in_blocks, inside) for inside in (True, False))
    shares = [*take_shares(matrices), *take_shares(others)]
    optimizers: list[Any] = [_muon(matrices, training)] if matrices else []
    return optimizers + ([adamw(others, training, device)] if others else []), shares


def _part(groups: list[Group], ids: set[int], inside: bool) -> list[Group]:
    parts = [{**group, "params": [p for p in group["params"] if (id(p) in ids) == inside]} for group in groups]
    return [part for part in parts if part["params"]]


def _muon(groups: list[Group], training: TrainingSection) -> torch.optim.Optimizer:
    """Scaled to the size of AdamW's updates (Moonshot's 0.2 sqrt(longer side)), so that its rates can be kept."""
    momentum = setting(training, "momentum")
    return torch.optim.Muon(groups, lr=training.lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")


def make_optimizer(groups: list[Group], training: TrainingSection, device: torch.device) -> torch.optim.Optimizer:
    """Any but muon."""
    if training.optimizer == "adamw":
        return adamw(groups, training, device)
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.lr, momentum=setting(training, "momentum"))
    if training.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=training.lr)
    if training.optimizer == "lion":
        from lion_pytorch import Lion

        lion: torch.optim.Optimizer = Lion(groups, lr=training.lr, betas=_betas(training))
        return lion
    told: dict[str, Any] = {"lr": training.lr, "betas": _betas(training), "eps": setting(training, "eps")}
    kept: torch.optim.Optimizer = _quantised(training.optimizer)(groups, **told)
    return kept


def _quantised(name: str) -> Any:
    """The class of a library that is there only where it was asked for."""
    from importlib import import_module

    module, _, kind = OPTIMISERS[name].source.rpartition(".")
    return getattr(import_module(module), kind)


def adamw(groups: list[Group], training: TrainingSection, device: torch.device) -> torch.optim.AdamW:
    """torch's AdamW, its fused kernel on CUDA."""
    return torch.optim.AdamW(
        groups,
        lr=training.lr,
        betas=_betas(training),
        eps=setting(training, "eps"),
        fused=device.type == "cuda",
    )


def setting(training: TrainingSection, key: str) -> float:
    """What the spec says, else the optimiser's own."""
    said = getattr(training, key)
    return OPTIMISERS[training.optimizer].settings[key] if said is None else float(said)


def _betas(training: TrainingSection) -> tuple[float, float]:
    return setting(training, "beta1"), setting(training, "beta2")
