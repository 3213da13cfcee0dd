"""Files behind a URL, from real servers on loopback: fetched once, kept through a lost network, found again by content."""

from __future__ import annotations

import gzip
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from launcher.data.prepare import prepare
from launcher.data.prepared import open_prepared
from launcher.errors import DataError, Interrupted
from tests.unit.test_data_prepare import all_rows, spec_of, write_rows

pytest.importorskip("aiohttp", reason="the extra `http` is not installed")


class Server(ThreadingHTTPServer):
    """Serves `files`; of what is in `lost` it closes the connection half way."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.lost: set[str] = set()
        self.served: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, with_body: bool) -> None:
        content = self.server.files.get(self.path)
        self.send_response(404 if content is None else 200)
        if content is not None:
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hash(content)}"')
        self.end_headers()
        if content is not None and with_body:
            self.server.served.append(self.path)
            self.wfile.write(content[: len(content) // 2] if self.path in self.server.lost else content)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launcher.data.remote.RETRY_SECONDS", (0.01, 0.02))
    write_rows(Path("rows.jsonl"), range(600))
    started = Server()
    lines = Path("rows.jsonl").read_bytes().splitlines(keepends=True)
    started.files = {"/a.jsonl": b"".join(lines[:300]), "/b.jsonl.gz": gzip.compress(b"".join(lines[300:]), mtime=0)}
    thread = threading.Thread(target=started.serve_forever, daemon=True)
    thread.start()
    yield started
    started.shutdown()
    started.server_close()
    thread.join()


def urls(server: Server) -> list[str]:
    return [f"http://127.0.0.1:{server.server_port}{path}" for path in sorted(server.files)]


def test_the_rows_are_those_of_local_files(server: Server) -> None:
    spec = spec_of(data={"train": urls(server), "prepared": "remote"})
    assert prepare(spec).is_new
    local = spec_of(data={"prepared": "local"})
    prepare(local)
    ours, theirs = (all_rows(open_prepared(one), "train") for one in (spec, local))
    assert [row["input_ids"].tolist() for row in ours] == [row["input_ids"].tolist() for row in theirs]
    served = len(server.served)
    assert not prepare(spec).is_new, "found by the marks of the server"
    assert len(server.served) == served
    assert not Path("remote.building").exists()


def test_a_lost_network_is_told_and_gone_on_from(server: Server) -> None:
    spec = spec_of(data={"train": urls(server)})
    server.lost = {"/b.jsonl.gz"}
    with pytest.raises(Interrupted) as caught:
        prepare(spec)
    assert str(caught.value).startswith(f"{urls(server)[1]}: cannot be fetched (")
    assert str(caught.value).endswith(
        "; see the network, and start the same command again: it goes on where it stopped"
    )
    server.lost, server.served = set(), []
    prepare(spec)
    assert set(server.served) == {"/b.jsonl.gz"}, "what had come is not fetched again"
    assert os.listdir("out") == ["data"]


def test_an_error_in_a_remote_file_names_its_url(server: Server) -> None:
    server.files["/a.jsonl"] += b"{broken\n"
    with pytest.raises(DataError) as caught:
        prepare(spec_of(data={"train": urls(server)}))
    assert str(caught.value).startswith(f"{urls(server)[0]}:301: is not JSON")


def test_a_url_of_nothing(server: Server) -> None:
    url = f"http://127.0.0.1:{server.server_port}/none.jsonl"
    with pytest.raises(DataError) as caught:
        prepare(spec_of(data={"train": url}))
    assert url in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_scheme_that_nobody_knows() -> None:
    with pytest.raises(
        DataError, match=r"data\.train: nope://x/a\.txt has a scheme that fsspec does not know \(nope\)"
    ):
        prepare(spec_of(data={"train": "nope://x/a.txt"}))
