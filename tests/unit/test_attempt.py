"""The first failure among many, what follows an attempt, nodes that differ, and a thousand nodes that meet over TCP."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.attempt.chain import Attempt, attempts, bad_nodes, began, cut_off, decide, ended
from launcher.attempt.channel import Disagreed, Head, Member
from launcher.attempt.preflight import Facts, disagreement
from launcher.attempt.records import RankRecord, State, first_failure, read_records, write_record
from launcher.emit.environment import allowed, carried, is_secret, shown
from launcher.errors import FleetuneError, SpecError
from launcher.spawn import free_port

FACTS = Facts("n1", "s", "p", "c", "d", 8)


def record(rank: int, state: State, at: float, message: str = "", code: int = 1) -> RankRecord:
    return RankRecord(rank, f"n{rank}", 100 + rank, state, at, message, code)


@pytest.mark.parametrize(
    ("records", "rank"),
    [
        # a rank that was killed is the cause, though the others' errors were written before it was found
        (
            [
                record(0, "failed", 1.0, "RuntimeError: Connection closed by peer [10.0.0.2]:1"),
                record(1, "killed", 2.0),
            ],
            1,
        ),
        ([record(0, "failed", 1.0, "Gloo allreduce failed: timed out"), record(2, "failed", 3.0, "ValueError: x")], 2),
        ([record(3, "failed", 2.0, "ValueError: late"), record(2, "failed", 1.0, "KeyError: early")], 2),
        ([record(0, "failed", 2.0, "Connection reset by peer"), record(1, "failed", 1.0, "Connection reset")], 1),
        ([record(0, "done", 1.0), record(1, "stopped", 1.0)], None),
    ],
)
def test_the_first_failure_is_no_echo(records: list[RankRecord], rank: int | None, tmp_path: Path) -> None:
    for each in records:
        write_record(tmp_path, each)
    found = first_failure(read_records(tmp_path))
    assert (found and found.rank) == rank


ATTEMPT = Attempt("slurm", "7", ("n1", "n2"), 1.0)
KILLED = record(1, "killed", 1.0)
BUG = record(1, "failed", 1.0, "KeyError: 'x'")
NCCL = record(1, "failed", 1.0, "DistBackendError: NCCL error in: ...")


@pytest.mark.parametrize(
    ("earlier", "code", "failure", "action"),
    [
        ([], 0, None, "finish"),
        ([], 75, None, "restart"),
        ([75] * 5, 75, None, "fail"),  # max_requeues 5
        ([], 2, BUG, "fail"),
        ([], 1, BUG, "fail"),
        ([], 1, KILLED, "restart"),
        ([], 1, NCCL, "restart"),
        ([], 1, None, "restart"),  # no rank left a word: its node went, or the rendezvous was lost
        ([1, 1, 1], 1, KILLED, "fail"),  # max_restarts 3
        ([1, 75, 1], 1, KILLED, "restart"),  # stops do not count as failures
    ],
)
def test_what_follows_an_attempt(earlier: list[int], code: int, failure: RankRecord | None, action: str) -> None:
    chain = [*(replace(ATTEMPT, ended=2.0, exit_code=before) for before in earlier), ATTEMPT]
    assert decide(chain, code, failure, max_restarts=3, max_requeues=5).action == action


def test_a_node_that_fails_twice_is_left_out() -> None:
    chain = [replace(ATTEMPT, failed_node=node) for node in ("n2", "n1", "n2", "")]
    assert bad_nodes(chain) == ("n2",)
    assert decide(chain, 1, KILLED, 9, 9).bad_nodes == ("n2",)


def test_the_chain_is_read_back_and_a_cut_off_attempt_is_closed(tmp_path: Path) -> None:
    """Also behind a line that a power cut left half written."""
    began(tmp_path, ATTEMPT)
    ended(tmp_path, replace(ATTEMPT, ended=2.0, exit_code=75, steps=(0, 3)))
    began(tmp_path, replace(ATTEMPT, began=3.0))
    (tmp_path / "attempts.jsonl").open("a").write('{"kind": "ended", "via"')
    assert [attempt.was_cut_off for attempt in attempts(tmp_path)] == [False, True]
    (tmp_path / "attempts.jsonl").open("a").write("\n")
    cut_off(tmp_path, {"n2": "went down"})
    last = attempts(tmp_path)[-1]
    assert (last.exit_code, last.failed_node, last.message) == (1, "n2", "cut off: n2 went down")
    before = (tmp_path / "attempts.jsonl").read_text()
    cut_off(tmp_path, {"n1": "went down"})
    assert (tmp_path / "attempts.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({}, None),
        ({"plan": "q"}, "n2: sees another plan (q and not p, as 2 of 3 nodes do); name a cluster file"),
        ({"code": "q"}, "n2: sees another version of the code or its packages (q and not c"),
        ({"data": "absent"}, "n2: sees other prepared data (absent and not d, as 2 of 3 nodes do); prepare once"),
        ({"gpus": 7}, "n2: sees another number of GPUs (7 and not 8, as 2 of 3 nodes do); leave the node out"),
        ({"problem": "cluster.name: x names no cluster file; known: cpu"}, "n2: cluster.name: x names no cluster file"),
    ],
)
def test_nodes_that_differ_are_named(odd: dict[str, object], words: str | None) -> None:
    others = [replace(FACTS, host=f"n{number}") for number in (1, 3)]
    found = disagreement([others[0], replace(FACTS, host="n2", **odd), others[1]])  # type: ignore[arg-type]
    assert found is None if words is None else (found or "").startswith(words)


def joined(num_nodes: int, facts: list[Facts]) -> tuple[Head | Exception, list[Member | Exception]]:
    """All nodes of an attempt, each in a thread; what each of them got."""
    port = free_port()
    got: list[Head | Member | Exception] = [FleetuneError("never came")] * num_nodes

    def node(number: int) -> None:
        try:
            got[number] = (
                Head(port, "id", num_nodes, facts[0], join_seconds=30)
                if number == 0
                else Member("127.0.0.1", port, "id", number, facts[number], join_seconds=30)
            )
        except FleetuneError as error:
            got[number] = error

    threads = [threading.Thread(target=node, args=(number,)) for number in range(num_nodes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return got[0], got[1:]  # type: ignore[return-value]


def test_nodes_meet_and_one_that_fails_takes_the_others_down() -> None:
    head, members = joined(24, [replace(FACTS, host=f"n{number}") for number in range(24)])
    assert isinstance(head, Head)
    down: dict[int, str] = {}
    heard = threading.Semaphore(0)
    for number, node in enumerate([head, *members]):
        assert isinstance(node, Head | Member)
        node.watch(lambda words, number=number: (down.__setitem__(number, words), heard.release()))
    members[4].leave("rank 5 killed")  # type: ignore[union-attr]
    assert all(heard.acquire(timeout=20) for _ in range(24 - 1))
    assert {words for number, words in down.items() if number != 5} == {"n5: rank 5 killed"}


def test_nodes_that_differ_all_hear_why_and_none_starts() -> None:
    facts = [replace(FACTS, host=f"n{number}", plan="q" if number == 2 else "p") for number in range(4)]
    head, members = joined(4, facts)
    said = {str(node) for node in [head, *members]}
    assert all(isinstance(node, Disagreed) for node in [head, *members])
    assert said == {
        "n2: sees another plan (q and not p, as 3 of 4 nodes do); name a cluster file with fixed figures, and keep the "
        "cost cache on a shared filesystem"
    }


def test_a_stranger_is_turned_away_and_a_missing_node_is_named() -> None:
    port = free_port()

    def come() -> None:
        with pytest.raises(FleetuneError):
            Member("127.0.0.1", port, "other", 1, FACTS, 5)

    stranger = threading.Thread(target=come)
    stranger.start()
    with pytest.raises(FleetuneError, match=r"2 of 3 nodes never came within 1 s \(numbers 1, 2\)"):
        Head(port, "id", 3, FACTS, join_seconds=1)
    stranger.join(10)


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True),
        ("WANDB_API_KEY", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("MLFLOW_TRACKING_PASSWORD", True),
        ("TOKENIZERS_PARALLELISM", False),
        ("NCCL_DEBUG", False),
        ("OMP_NUM_THREADS", False),
    ],
)
def test_secrets_are_known_by_their_names(name: str, secret: bool) -> None:
    assert is_secret(name) is secret
    assert ("x=y" in shown({name: "x=y"})) is not secret


def test_only_what_is_on_the_list_goes_along() -> None:
    environment = {"NCCL_DEBUG": "INFO", "MY_A": "1", "MY_B": "2", "EDITOR": "vi", "BASH_FUNC_x%%": "() { :; }"}
    assert carried(environment, allowed(("MY_*",))) == {"MY_A": "1", "MY_B": "2", "NCCL_DEBUG": "INFO"}
    with pytest.raises(SpecError, match=r"launch\.environment: 'A B' is not the name"):
        allowed(("A B",))


def test_records_are_json(tmp_path: Path) -> None:
    write_record(tmp_path, KILLED)
    (path,) = (tmp_path / "ranks").iterdir()
    assert json.loads(path.read_text())["state"] == "killed"
