"""Real DeepSpeed and real FSDP2 open what was converted for them, on three ranks, and training goes on as if nothing was.

The curve that they must follow is a plain loop's in one process, from the state that was saved: no engine, no
checkpoint. Three ranks divide none of the shapes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.convert_ranks import VOCAB, make_model, param_groups
from tests.support import run_ranks, torchrun
from tools.convert import convert

RANKS = 3
CASES = {
    # name: (source, target's format, its stage)
    "fsdp to zero1": ("fsdp", "zero", 1),
    "zero3 to zero1": ("zero3", "zero", 1),
    "zero1 to zero2": ("zero1", "zero", 2),
    "zero1 to zero3": ("zero1", "zero", 3),
    "fsdp to zero3": ("fsdp", "zero", 3),
    "fsdp to universal": ("fsdp", "universal", 2),
    "zero3 to fsdp": ("zero3", "dcp", 0),
    "zero2 to fsdp": ("zero2", "dcp", 0),
}
TOLERANCE = 1e-5  # of a loss, fp32; sums over ranks are taken in another order


@pytest.fixture(scope="module")
def losses(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("loads")
    cases: dict[str, dict[str, Any]] = {}
    for name, (engine, kind, stage) in CASES.items():
        out = folder / name.replace(" ", "-")
        convert(str(saved / engine / "gpt2"), f"{kind}:{out}", ranks=RANKS, stage=stage or None)
        truth = {part: str(saved / part / f"{engine}-gpt2.safetensors") for part in ("truth", "moments")}
        cases[name] = {"folder": str(out), "stage": stage, "model": "gpt2", "universal": kind == "universal", **truth}
    (folder / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("convert_loads.py")
    code = run_ranks(torchrun(RANKS, script, folder / "cases.json"), folder / "log")
    assert code == 0, (folder / "log").read_text()[-4000:]
    return dict(json.loads((folder / "cases.losses").read_text()))


def plain_losses(weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor] | None) -> list[float]:
    """Three losses of one process; without moments, those of a resume that kept the weights alone."""
    model = make_model("gpt2")
    model.load_state_dict(weights, strict=False)
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    for name, parameter in model.named_parameters() if moments is not None else ():
        states = {key: moments[f"{name}/{key}"].clone() for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **states}
    ids = (torch.arange(20).reshape(2, 10) * 5) % VOCAB
    losses = []
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, float(model(input_ids=ids, labels=ids).loss)]


@pytest.mark.parametrize("case", CASES)
def test_the_other_engine_goes_on_as_if_it_had_been_there_all_along(
    saved: Path, losses: dict[str, list[float]], case: str
) -> None:
    engine = CASES[case][0]
    weights, moments = (load_file(saved / part / f"{engine}-gpt2.safetensors") for part in ("truth", "moments"))
    assert losses[case] == pytest.approx(plain_losses(weights, moments), rel=TOLERANCE)


def test_weights_alone_would_give_another_curve(saved: Path) -> None:
    """The control: with fresh moments the same steps end far outside of the tolerance."""
    weights, moments = (load_file(saved / part / "zero3-gpt2.safetensors") for part in ("truth", "moments"))
    whole, alone = plain_losses(weights, moments), plain_losses(weights, None)
    assert whole[0] == alone[0]
    assert abs(whole[2] - alone[2]) > 100 * TOLERANCE * whole[2]
