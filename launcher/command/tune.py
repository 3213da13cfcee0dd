"""`fleetune sweep`: trials of a job with other values of some keys, chosen by Optuna, kept in one study file.

Optuna proposes (TPE, Bergstra et al. 2011) and gives up on trials that fall behind the median of the others at the same
step. A trial is an ordinary run in `<output_dir>/trials/NNNN`. Killed and started again, a sweep goes on: finished trials
are kept, one that was cut off goes on from its own checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.command.options import Overrides, SpecPath
from launcher.errors import ABSENT, EXIT_DONE, EXIT_PREEMPTED, EXIT_USER, FleetuneError, Problem, SpecError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial

    from launcher.job import JobSpec
    from launcher.job.spec import SweepRange, SweepSection

STUDY = "study.jsonl"
FIRST = 5
"""Trials that are drawn at random, and that none is compared with before: Optuna's own default for its median."""
_OF_THE_DATA = ("data.", "task", "training.seq_len", "model.")
"""Keys that may change what is prepared: each trial then prepares its own."""


def sweep(
    spec_path: SpecPath,
    overrides: Overrides = [],  # noqa: B006
    trials: Annotated[int | None, typer.Option(min=1, help="Finished trials to have in the end.")] = None,
) -> None:
    """Search for better values of the keys in the spec's `sweep`, one run after the other; resumable."""
    from launcher.job import load_spec

    spec = load_spec(spec_path, overrides)
    section = checked(spec)
    firsts = {key: space[0] if isinstance(space, tuple) else space.low for key, space in section.parameters.items()}
    load_spec(
        spec_path, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in firsts.items())]
    )  # keys there are
    study = open_study(spec, section)
    wanted = trials or section.trials
    shared = not any(key.startswith(_OF_THE_DATA) for key in section.parameters)
    if shared:
        _run([spec_path.as_posix(), *_sets(overrides)], "prepare")
    _requeue(study)
    while (done := len(_finished(study))) < wanted:
        trial = study.ask()
        own = [*overrides, *chosen(trial, section)]
        folder = Path(str(trial.user_attrs.get("folder", Path(spec.output_dir) / "trials" / f"{trial.number:04d}")))
        trial.set_user_attr("folder", str(folder))
        own += [f"output_dir={json.dumps(str(folder))}"]
        own += [f"data.prepared={json.dumps(spec.prepared_dir)}"] if shared else []
        typer.echo(f"trial {trial.number} ({done + 1} of {wanted}): {_words(trial.params)}")
        _one(study, trial, section, spec_path, own, folder, prepare=not shared)
    typer.echo(told(study, section))


def checked(spec: JobSpec) -> SweepSection:
    """Raises `SpecError`: nothing to vary, a key that is none, or no Optuna."""
    from importlib.util import find_spec

    from launcher.job.tasks import METRICS

    if spec.sweep is None:
        way_out = "add e.g. `sweep: {parameters: {training.lr: {low: 1e-5, high: 1e-3, log: true}}}`"
        raise SpecError("sweep", ABSENT, "is missing: it says what is varied", way_out)
    if find_spec("optuna") is None:
        rule = "needs the package optuna, which is not installed"
        raise SpecError("sweep", ABSENT, rule, "pip install 'fleetune[sweep]'")
    problems = [
        Problem(f"sweep.parameters.{key}", ABSENT, *wrong)
        for key, space in spec.sweep.parameters.items()
        if not isinstance(space, tuple) and (wrong := _wrong_range(space))
    ]
    if problems:
        raise SpecError.several(problems)
    known = METRICS[spec.task.name]
    if metric_of(spec) not in known:
        rule = f"is no score of {spec.task.name}"
        raise SpecError("sweep.metric", metric_of(spec), rule, f"choose one of {', '.join(known)}")
    return spec.sweep.model_copy(update={"metric": metric_of(spec)})


def _wrong_range(space: SweepRange) -> tuple[str, str] | None:
    """Rule and way out."""
    if not space.low < space.high:
        return f"has `low` {space.low:g}, which is not below `high` {space.high:g}", "mend one of them"
    if space.log and (space.low <= 0 or space.step is not None):
        return "is `log`, which needs a `low` above 0 and no `step`", "mend it, or leave `log` out"
    return None


def metric_of(spec: JobSpec) -> str:
    assert spec.sweep is not None
    return spec.sweep.metric or spec.evaluation.metric or "loss"


def open_study(spec: JobSpec, section: SweepSection) -> Study:
    """The one in `<output_dir>/study.jsonl`, made where there is none."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    from launcher.job.tasks import LOWER_IS_BETTER

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    Path(spec.output_dir).mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(Path(spec.output_dir) / STUDY)))
    pruner = (
        optuna.pruners.MedianPruner(n_startup_trials=FIRST)
        if section.pruning == "median"
        else optuna.pruners.NopPruner()
    )
    study = optuna.create_study(
        storage=storage,
        study_name="fleetune",
        pruner=pruner,
        direction="minimize" if section.metric in LOWER_IS_BETTER else "maximize",
        load_if_exists=True,
    )
    # started again, it draws other numbers than those before
    study.sampler = optuna.samplers.TPESampler(seed=(spec.seed + len(study.trials)) % 2**32, n_startup_trials=FIRST)
    return study


def chosen(trial: Trial, section: SweepSection) -> list[str]:
    """The trial's values, as `--set` takes them."""
    return [f"{key}={json.dumps(_suggested(trial, key, space))}" for key, space in section.parameters.items()]


def _suggested(trial: Trial, key: str, space: Any) -> Any:
    if isinstance(space, tuple):
        return trial.suggest_categorical(key, list(space))
    if all(isinstance(bound, int) for bound in (space.low, space.high, space.step or 1)):
        return trial.suggest_int(key, space.low, space.high, step=space.step or 1, log=space.log)
    return trial.suggest_float(key, space.low, space.high, step=space.step, log=space.log)


def _requeue(study: Study) -> None:
    """A trial that was running when the sweep was killed is asked for again, in its folder."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params, user_attrs={"folder": trial.user_attrs.get("folder", "")})


def _finished(study: Study) -> list[Any]:
    """Complete or given up; what failed is tried no more, and counted, so that a sweep ends."""
    from optuna.trial import TrialState

    states = [TrialState.COMPLETE, TrialState.PRUNED]
    failed = [t for t in study.get_trials(states=[TrialState.FAIL]) if "error" in t.user_attrs]
    return [*study.get_trials(states=states), *failed]


def _one(
    study: Study, trial: Trial, section: SweepSection, spec_path: Path, own: list[str], folder: Path, prepare: bool
) -> None:
    """Run it, report its scores as they come, stop it where it falls behind."""
    from optuna.trial import TrialState

    assert section.metric is not None
    metric, seen, given_up = section.metric, 0, False

    def falls_behind() -> bool:
        nonlocal seen, given_up
        scores = scores_of(folder, metric)
        for step, value in scores[seen:]:
            trial.report(value, step)
        is_new, seen = len(scores) > seen, len(scores)
        given_up = given_up or (is_new and trial.should_prune())
        return given_up

    words = [spec_path.as_posix(), *_sets(own)]
    folder.mkdir(parents=True, exist_ok=True)
    if prepare:
        _run(words, "prepare")
    code = _launch(words, folder / "trial.log", falls_behind)
    scores = scores_of(folder, metric)
    if given_up and code in (EXIT_PREEMPTED, EXIT_DONE):
        study.tell(trial, state=TrialState.PRUNED)
        typer.echo(f"  given up after step {scores[-1][0]}: {metric} {scores[-1][1]:.4g}")
    elif code == EXIT_DONE and scores:
        best = (min if study.direction.name == "MINIMIZE" else max)(value for _, value in scores)
        study.tell(trial, best)
        typer.echo(f"  {metric} {best:.6g}")
    elif code == EXIT_PREEMPTED:
        raise typer.Exit(code)  # told to stop: the trial is still running, as far as the study knows
    else:
        _failed(study, trial, folder, code)


def _failed(study: Study, trial: Trial, folder: Path, code: int) -> None:
    """One that diverged, or whose values do not go together, is no end of the sweep; when all do, it is."""
    from optuna.trial import TrialState

    error = _last_words(folder / "trial.log")
    trial.set_user_attr("error", error)
    study.tell(trial, state=TrialState.FAIL)
    typer.echo(f"  failed: {error}", err=True)
    if len(_finished(study)) >= 3 and not study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED]):
        if code == EXIT_USER:
            raise SpecError("sweep", ABSENT, f"gives values that cannot be run ({error})", "mend the spec")
        raise FleetuneError(f"every trial failed: {error}; see {folder / 'trial.log'}")


def _last_words(log: Path) -> str:
    errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else f"see {log}"


def scores_of(folder: Path, metric: str) -> list[tuple[int, float]]:
    """(step, score) of every evaluation that a run has recorded."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [(r["step"], r[metric]) for r in found if r["kind"] == "evaluation" and r.get(metric) == r.get(metric)]


def _launch(words: list[str], log: Path, stop_when: Any) -> int:
    from launcher.spawn import run_until_done

    with log.open("a") as file:
        return run_until_done([sys.executable, "-m", "launcher", "launch", *words], {}, stop_when, file)


def _run(words: list[str], command: str) -> None:
    from launcher.spawn import run_until_done

    code = run_until_done([sys.executable, "-m", "launcher", command, *words], {})
    if code != EXIT_DONE:
        raise typer.Exit(code)


def _sets(overrides: list[str]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def _words(params: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()
    )


def told(study: Study, section: SweepSection) -> str:
    """The five best, and how to take the first. Raises `FleetuneError` where none finished."""
    from optuna.trial import TrialState

    complete = study.get_trials(states=[TrialState.COMPLETE])
    if not complete:
        raise FleetuneError("no trial came to its end; see the trials' logs")
    ordered = sorted(complete, key=lambda trial: trial.value or 0.0, reverse=study.direction.name == "MAXIMIZE")
    lines = [
        f"{section.metric} {trial.value:.6g}  trial {trial.number}: {_words(trial.params)}" for trial in ordered[:5]
    ]
    best = " ".join(f"--set {key}={json.dumps(value)}" for key, value in ordered[0].params.items())
    return "\n".join([*lines, f"the best, in {ordered[0].user_attrs['folder']}: {best}"])
