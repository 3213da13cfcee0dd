"""The table of which features go together: refused before anything starts, and the same table that README shows."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.errors import SpecError
from launcher.job import parse_spec
from launcher.job.packages import check_packages
from launcher.job.together import LIMITS, check_device, permits, table
from launcher.plan.knobs import CAN, STRATEGIES
from tests.support import REPO

BEGIN, END = (
    "<!-- what goes together: written by tests/unit/test_together.py --update-golden -->\n\n",
    "\n\n<!-- end -->",
)


def spec(**training: Any) -> Any:
    return raw(training=training)


def raw(**sections: Any) -> Any:
    whole: dict[str, Any] = {
        "output_dir": "run",
        "model": {"path": "m"},
        "task": "causal_lm",
        "data": {"train": "corpus.txt"},
        "training": {"seq_len": 8, "global_batch_size": 2, "max_steps": 5},
    }
    for name, section in sections.items():
        whole[name] = {**whole[name], **section} if isinstance(whole.get(name), dict) else section
    return parse_spec(whole)


def test_readme_shows_the_table(request: pytest.FixtureRequest) -> None:
    path = REPO / "README.md"
    text = path.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    if request.config.getoption("--update-golden"):
        path.write_text(f"{before}{BEGIN}{table()}{END}{after}")
    assert path.read_text() == f"{before}{BEGIN}{table()}{END}{after}"


def test_the_planner_knows_the_same() -> None:
    """Precisions and places of each strategy, as the planner tries them, are those that no limit forbids."""
    for strategy in STRATEGIES:
        for precision in ("fp32", "bf16", "pure_bf16", "fp16"):
            fits = permits(spec(), {"parallel.strategy": strategy, "parallel.precision": precision})
            assert fits == (precision in CAN[strategy].precisions), (strategy, precision)
        for key, place in (("offload_optimizer", 0), ("offload_params", 1)):
            for where in ("cpu", "nvme"):
                fits = permits(spec(), {"parallel.strategy": strategy, f"parallel.{key}": where})
                assert fits == any(pair[place] == where for pair in CAN[strategy].offloads), (strategy, key, where)


OURS = [limit for limit in LIMITS if limit.other == "parallel.strategy" and not limit.key.startswith("parallel.")]
"""Limits of strategies that the planner does not refuse itself; its own are held by test_plan_knobs.py."""


@pytest.mark.parametrize("limit", OURS, ids=lambda limit: f"{limit.key} {'/'.join(limit.values)}")
def test_every_limit_holds_for_what_it_names_and_for_nothing_else(limit: Any) -> None:
    """Each value with each strategy: refused exactly where the table says so."""
    section, _, key = limit.key.partition(".")
    for value in limit.values:
        for strategy in STRATEGIES:
            told = {section: {key: _some(limit.key, value)}, "parallel": {"strategy": strategy}}
            allowed = all(
                strategy in other.allowed
                for other in LIMITS
                if (other.key, other.other) == (limit.key, limit.other) and value in other.values
            )
            if allowed:
                raw(**told)
                continue
            with pytest.raises(SpecError, match=f"{key}.* does not go with parallel.strategy {strategy}"):
                raw(**told)


def _some(key: str, value: str) -> Any:
    return {"training.l1": 0.1, "training.ema_decay": 0.9, "method.unfreeze_every_steps": 3}.get(key, value)


def test_a_machine_can_be_the_wrong_one() -> None:
    paged = spec(optimizer="paged_adamw")
    check_device(paged, "cuda")
    with pytest.raises(SpecError, match="paged_adamw needs cuda"):
        check_device(paged, "cpu")


def test_settings_of_another_optimiser_or_schedule_are_refused() -> None:
    with pytest.raises(SpecError, match=r"training.momentum: 0.5 has no effect on adamw: it belongs to muon, sgd"):
        spec(momentum=0.5)
    with pytest.raises(SpecError, match=r"training.eps: .* has no effect on lion"):
        spec(optimizer="lion", eps=1e-6)
    with pytest.raises(SpecError, match=r"training.lr_power: 2.0 has no effect on the schedule cosine"):
        spec(lr_power=2)
    spec(optimizer="muon", momentum=0.5, beta1=0.8, schedule="polynomial", lr_power=2)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.job.packages.find_spec", lambda name: None)
    check_packages(spec())
    with pytest.raises(SpecError, match=r"lion needs the package lion-pytorch.*pip install 'fleetune\[lion\]'"):
        check_packages(spec(optimizer="lion"))
