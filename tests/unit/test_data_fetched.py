"""Prepared data behind a URL, from real servers on loopback: the order, the bytes and the bounds of what is kept."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data import fetched, shards
from launcher.data.prepare import prepare
from launcher.data.prepared import PreparedData, open_prepared
from launcher.data.stream import BatchStream
from launcher.data.training import TrainingData, open_training
from launcher.errors import DataError, Interrupted
from launcher.job.spec import JobSpec
from tests.unit.test_data_prepare import all_rows, error_of, spec_of, write_rows
from tests.unit.test_data_remote import Server

pytest.importorskip("aiohttp", reason="the extra `http` is not installed")

WINDOW = 3
BATCH = 16
LOCAL = {"prepared": "made", "packing": "none"}


@pytest.fixture(autouse=True)
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreparedData:
    """Some forty shards of sixty rows in `made`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launcher.data.remote.RETRY_SECONDS", (0.01, 0.02))
    monkeypatch.setattr(shards, "BATCH_ROWS", 60)
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)
    write_rows(Path("rows.jsonl"), range(2500))
    prepare(spec_of(data=LOCAL), num_workers=1)
    return open_prepared(spec_of(data=LOCAL))


@pytest.fixture
def server(made: PreparedData) -> Iterator[Server]:
    started = Server()
    started.files = {
        f"/data/{path.relative_to(made.folder)}": path.read_bytes() for path in made.folder.rglob("*") if path.is_file()
    }
    thread = threading.Thread(target=started.serve_forever, daemon=True)
    thread.start()
    yield started
    started.shutdown()
    started.server_close()
    thread.join()


def remote_spec(server: Server, **data: Any) -> JobSpec:
    url = f"http://127.0.0.1:{server.server_port}/data"
    return spec_of(
        data={**LOCAL, "prepared": url, "window_shards": WINDOW, "cache_dir": "kept", "cache_gib": 3e-5, **data}
    )


def opened(spec: JobSpec, cursor: dict[str, Any] | None = None) -> TrainingData:
    return open_training(spec, open_prepared(spec), cursor, "2026-11-28")


def batches(training: TrainingData, positions: range, world: int) -> list[list[tuple[int, int, list[int]]]]:
    """Of each global batch: sample, epoch and tokens of every row, whichever rank read it, sorted."""
    streams = [
        BatchStream(training.split, training.order, BATCH, rank, world, 1, ahead=training.ahead)
        for rank in range(world)
    ]
    return [
        sorted(
            (row["sample"], row["epoch"], row["input_ids"].tolist())
            for stream in streams
            for some in stream.micro_batches(position)
            for row in some
        )
        for position in positions
    ]


def kept_bytes() -> int:
    return sum(path.stat().st_size for path in Path("kept").glob("*/*/*.arrow"))


def test_every_sample_once_in_a_bounded_folder_and_the_same_on_other_ranks(server: Server, made: PreparedData) -> None:
    """One epoch and a little more, 2 ranks and then 4, stopped in between: as one rank that reads the local folder."""
    spec = remote_spec(server)
    training, limit = opened(spec), int(3e-5 * 2**30)
    total = sum(shard["size"] for shard in made.index["splits"]["train"]["shards"])
    assert total > 3 * limit, "it cannot all be kept"
    positions = range(0, (len(training.split) // BATCH + 3) * BATCH, BATCH)
    middle = positions[len(positions) // 2]
    seen, most = [], 0
    for position in range(0, middle, BATCH):
        seen += batches(training, range(position, position + 1), 2)
        most = max(most, kept_bytes())
    resumed = opened(spec, training.cursor_at(middle).to_json())
    assert resumed.cursor.position == middle
    seen += batches(resumed, range(middle, positions.stop, BATCH), 4)
    in_flight = fetched._NUM_THREADS * max(shard["size"] for shard in made.index["splits"]["train"]["shards"])
    assert 0 < most <= limit + 2 * in_flight
    local = opened(spec_of(data={**LOCAL, "window_shards": WINDOW}))
    assert local.ahead is None
    assert seen == batches(local, positions, 1)
    ids = [sample for batch in seen for sample, epoch, _ in batch if epoch == 0]
    assert sorted(ids) == list(range(len(training.split)))


def test_shards_of_the_next_window_come_before_they_are_needed(server: Server) -> None:
    training = opened(remote_spec(server))
    assert training.ahead is not None
    wanted = training.order.shards(0)  # type: ignore[attr-defined]
    training.ahead(0)
    _until(lambda: len(list(Path("kept").glob("*/train/*.arrow"))) == len(wanted) == 2 * WINDOW)
    served = list(server.served)
    assert training.split.rows(training.order.samples(0, BATCH))
    assert server.served == served, "read from what had come"


def test_what_is_kept_serves_the_next_run_and_is_looked_at_again(server: Server) -> None:
    spec = remote_spec(server, cache_gib=1.0)
    expected = [row["input_ids"].tolist() for row in all_rows(open_prepared(spec), "validation")]
    served = len(server.served)
    shard = next(Path("kept").glob("*/validation/*.arrow"))
    shard.write_bytes(b"x" * shard.stat().st_size)
    again = all_rows(open_prepared(spec), "validation")
    assert [row["input_ids"].tolist() for row in again] == expected
    assert server.served[served:] == ["/data/index.json", f"/data/validation/{shard.name}"]


def test_a_shard_that_was_altered_there_is_named_with_its_samples(server: Server, made: PreparedData) -> None:
    shard = made.index["splits"]["validation"]["shards"][1]
    first = made.index["splits"]["validation"]["shards"][0]["num_samples"]
    path = f"/data/validation/{shard['file']}"
    server.files[path] = server.files[path][:-1] + b"!"
    data = open_prepared(remote_spec(server))
    url = f"http://127.0.0.1:{server.server_port}{path}"
    assert error_of(lambda: all_rows(data, "validation")) == (
        f"{url}: does not have the checksum it was written with (validation samples {first} to "
        f"{first + shard['num_samples'] - 1}); copy the prepared folder there again"
    )
    assert not list(Path("kept").rglob("*.new*")), "nothing broken is left"


def test_a_network_that_comes_back_is_not_noticed_and_a_lost_one_is_told(server: Server, made: PreparedData) -> None:
    spec = remote_spec(server)
    data = open_prepared(spec)
    path = f"/data/validation/{made.index['splits']['validation']['shards'][0]['file']}"
    server.lost = {path}
    back = threading.Timer(0.005, server.lost.clear)
    back.start()
    assert all_rows(data, "validation")
    back.join()
    server.lost = {f"/data/validation/{shard['file']}" for shard in made.index["splits"]["validation"]["shards"]}
    for kept in Path("kept").glob("*/validation/*"):
        kept.unlink()
    with pytest.raises(Interrupted, match="cannot be fetched"):
        all_rows(open_prepared(spec), "validation")
    server.lost.clear()
    assert all_rows(open_prepared(spec), "validation"), "the same command goes on"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy into /dev/full fails as on a full disk: with ENOSPC at the first write."""
    data = open_prepared(remote_spec(server))
    really = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, mode="r", *rest: really(Path("/dev/full") if "w" in mode else path, mode, *rest)
    )
    message = error_of(lambda: all_rows(data, "validation"))
    assert "cannot be written (No space left on device)" in message
    assert message.endswith("make room, or give another data.cache_dir, and start the same command again")


def test_room_for_less_than_two_windows_is_refused(server: Server) -> None:
    message = error_of(lambda: open_prepared(remote_spec(server, window_shards=100)))
    assert message.startswith("data.cache_gib: 3e-05 is less than two windows of 100 shards (")


def test_nothing_is_written_behind_a_url(server: Server) -> None:
    assert "data.prepared: http://" in error_of(lambda: prepare(remote_spec(server)))


def test_an_s3_server(made: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    """moto's server speaks S3: prepare from a bucket, and train from a prepared folder in it."""
    pytest.importorskip("s3fs", reason="the extra `s3` is not installed")
    server_of = pytest.importorskip("moto.server", reason="moto is not installed").ThreadedMotoServer
    server = server_of(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            *(("AWS_ACCESS_KEY_ID", "testing"), ("AWS_SECRET_ACCESS_KEY", "testing")),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        import fsspec

        system = fsspec.filesystem("s3", skip_instance_cache=True)
        system.mkdir("bucket")
        system.put(str(made.folder), "bucket/made", recursive=True)
        system.put("rows.jsonl", "bucket/texts/rows.jsonl")
        prepare(spec_of(data={"train": "s3://bucket/texts/*.jsonl", "packing": "none"}), num_workers=1)
        local = all_rows(made, "train")
        ours = all_rows(open_prepared(spec_of(data={"train": "s3://bucket/texts/*.jsonl", "packing": "none"})), "train")
        assert [row["input_ids"].tolist() for row in ours] == [row["input_ids"].tolist() for row in local]
        away = {"prepared": "s3://bucket/made", "window_shards": WINDOW, "cache_dir": "kept", "cache_gib": 3e-5}
        training = opened(spec_of(data={**LOCAL, **away}))
        read = batches(training, range(0, 20 * BATCH, BATCH), 2)
        assert read == batches(opened(spec_of(data={**LOCAL, "window_shards": WINDOW})), range(0, 20 * BATCH, BATCH), 1)
        assert training.cursor.fingerprint.endswith(f"+window-{WINDOW}")
    finally:
        server.stop()


def test_many_processes_share_what_one_fetched(server: Server) -> None:
    """Two stores of the same folder, as two ranks have, asked at once: each shard comes over the network once."""
    spec = remote_spec(server, cache_gib=1.0)
    splits = [open_prepared(spec).split("validation") for _ in range(2)]
    server.served.clear()
    threads = [threading.Thread(target=split.rows, args=(np.arange(len(split)),)) for split in splits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.served) == len(set(server.served)) == len(splits[0].entry["shards"])
    assert not [name for name in os.listdir(splits[0].folder) if not name.endswith(".arrow")], "no lock, no half file"


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end, "it did not come in 10 seconds"
        time.sleep(0.01)


def test_a_folder_without_an_index_there(server: Server) -> None:
    del server.files["/data/index.json"]
    with pytest.raises(DataError, match=r"/data/index\.json: does not exist; mend the URL"):
        open_prepared(remote_spec(server))
