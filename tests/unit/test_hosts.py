"""Hostfiles, filters and the order of ranks, held against DeepSpeed's own reading; a thousand machines without a process."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.emit.hosts import Host, filtered, hosts_of, parse_hostfile, rank_table, ranks_per_host
from launcher.errors import SpecError
from launcher.job.load import decode
from launcher.job.spec import LaunchSection

GOOD = "# ours\nn1 slots=4\n\nann@n2  slots=4 # rack 2\n"


def test_a_hostfile_is_read_as_deepspeed_reads_it() -> None:
    from deepspeed.launcher.runner import _parse_hostfile

    ours = parse_hostfile(GOOD, "hosts")
    assert [(host.name, len(host.slots)) for host in ours] == list(_parse_hostfile(GOOD.splitlines()).items())
    assert ours[1].address == "n2"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("n1 slots=2\nn1 slots=2\n", "hosts:2: n1 is named twice; give all its slots in one line"),
        ("n1 slots=0\n", "hosts:1: n1 has no slots; remove the line, or give it slots"),
        ("n1 slots=5000\n", "hosts:1: n1 has 5000 slots, more than any machine; mend the number"),
        ("n1\n", "hosts:1: n1 is not of the form `name slots=N`; write e.g. `node1 slots=8`"),
        ("n1 slots=-2\n", "hosts:1: 'n1 slots=-2' is not of the form `name slots=N`; write e.g. `node1 slots=8`"),
        ("# nothing\n", "hosts: names no machine; write one `name slots=8` per line"),
        ("$(touch${IFS}x) slots=2\n", "is not the name of a machine"),
        ("-oProxyCommand=x slots=2\n", "is not the name of a machine"),
        ("a;b slots=2\n", "is not the name of a machine"),
        ("n1 slots=0\nn2\n", "hosts:2: n2 is not of the form"),
    ],
)
def test_a_mistake_in_a_hostfile_is_named_by_its_line(text: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_hostfile(text, "hosts")
    assert words in str(caught.value)


hosts_and_filters = st.integers(1, 5).flatmap(
    lambda count: st.tuples(
        st.lists(st.integers(1, 4), min_size=count, max_size=count),
        st.lists(st.tuples(st.integers(0, count - 1), st.booleans()), min_size=1, unique_by=lambda pair: pair[0]),
        st.booleans(),
    )
)


@given(hosts_and_filters)
def test_filters_keep_what_deepspeed_keeps(drawn: tuple[list[int], list[tuple[int, bool]], bool]) -> None:
    """Also slot by slot: `n0@n2:0`."""
    from deepspeed.launcher.runner import parse_resource_filter

    slots, named, is_include = drawn
    hosts = tuple(Host(f"n{number}", tuple(range(count))) for number, count in enumerate(slots))
    text = "@".join(f"n{number}" + (":0" if has_slot else "") for number, has_slot in named)
    theirs = {host.name: list(host.slots) for host in hosts}
    key = "include_str" if is_include else "exclude_str"
    expected = parse_resource_filter(theirs, **{key: text})
    words = (text if is_include else None, None if is_include else text)
    if not expected:
        with pytest.raises(SpecError, match="leaves no machine"):
            filtered(hosts, *words)
        return
    ours = filtered(hosts, *words)
    assert {host.name: list(host.slots) for host in ours} == expected


@pytest.mark.parametrize(
    ("include", "words"),
    [
        ("n9", "launch.include: n9 is no machine of the list; known: n1, n2"),
        ("n1:7", "launch.include: n1:7 names slot 7, which n1 does not have; it has 0 to 1"),
        ("n1:x", "launch.include: n1:x is not of the form `name` or `name:0,2`; write e.g. n1@n2:0,2"),
    ],
)
def test_a_filter_that_names_what_is_not_there_is_refused(include: str, words: str) -> None:
    hosts = (Host("n1", (0, 1)), Host("n2", (0, 1)))
    with pytest.raises(SpecError) as caught:
        filtered(hosts, include, None)
    assert str(caught.value) == words


def test_ranks_go_machine_by_machine_over_1024_machines_of_8(tmp_path: Path) -> None:
    """8,192 ranks: each number once, node by node, the head the first; the same order as DeepSpeed's node launcher gives."""
    path = tmp_path / "hosts"
    path.write_text("".join(f"node{number:04d} slots=8\n" for number in range(1024)))
    section = decode(LaunchSection, {"hostfile": str(path), "exclude": "node0000@node0512"})
    hosts = hosts_of(section, gpus_per_node=8)
    table = rank_table(hosts)
    assert len(hosts) == 1022
    assert [place.rank for place in table] == list(range(1022 * 8))
    assert {place.rank // 8 for place in table} == set(range(1022))
    for place in table:
        assert (place.host, place.local_rank) == (hosts[place.rank // 8].name, place.rank % 8)
    assert table[0].host == "node0001"


def test_machines_of_different_width_are_refused() -> None:
    with pytest.raises(SpecError, match=r"gives n1 2 ranks and n2 1; give every machine as many slots"):
        ranks_per_host((Host("n1", (0, 1)), Host("n2", (0,))))


@pytest.mark.parametrize(
    ("names", "words"),
    [(["n1", "n1"], "named twice"), (["$(x)"], "not the name of a machine"), (["-v"], "not the name of a machine")],
)
def test_a_list_of_machines_is_checked_as_well(names: list[str], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        hosts_of(decode(LaunchSection, {"hosts": names}), 2)
