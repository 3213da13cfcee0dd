"""The nodes of one attempt, joined to the first by TCP: they agree before ranks start, and hear at once when one fails.

Lines of JSON. A member says `facts`; the head, once it has all of them, answers `go` or `stop` with the reason. After
that a member says `failed` or `done`, and the head tells all others `down`. A connection that breaks is a lost node:
keep-alive finds one whose power was cut within about 9 s, where a collective would wait for half an hour.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from launcher.attempt.preflight import Facts, disagreement
from launcher.errors import ABSENT, FleetuneError, UserError

JOIN_SECONDS = 600.0
"""Python may take minutes to load on many nodes at once."""
_KEEP_ALIVE = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}
_LARGEST_LINE = 1 << 16


class RankLost(FleetuneError):
    """Another node failed, or is gone."""


class _Wire:
    """A socket of lines."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._rest = b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def say(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # it is gone: that is found where it is read
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def hear(self) -> dict[str, Any] | None:
        """The next message; None when the other end is gone, or says what is no message."""
        while b"\n" not in self._rest:
            try:
                more = self.socket.recv(4096)
            except OSError:
                return None
            if not more or len(self._rest) > _LARGEST_LINE:
                return None
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            return None
        return message if isinstance(message, dict) else None


class Member:
    """A node other than the first."""

    def __init__(
        self, head: str, port: int, token: str, node: int, facts: Facts, join_seconds: float = JOIN_SECONDS
    ) -> None:
        self._wire = _Wire(_reach(head, port, join_seconds))
        self._wire.say(token=token, node=node, facts=facts.to_json())
        self._wire.socket.settimeout(join_seconds)
        answer = self._wire.hear()
        self._wire.socket.settimeout(None)
        if answer is None:
            raise FleetuneError(f"the first node, {head}, left before all nodes had come; its own log says why")
        if "stop" in answer:
            raise Disagreed(answer["stop"])

    def watch(self, on_down: Callable[[str], None]) -> None:
        def listen() -> None:
            message = self._wire.hear()
            if message is None:
                on_down("the first node is gone")
            elif "down" in message:
                on_down(str(message["down"]))

        threading.Thread(target=listen, daemon=True).start()

    def leave(self, failure: str | None) -> None:
        self._wire.say(**({"failed": failure} if failure else {"done": True}))


class Disagreed(UserError):
    """The nodes must not start."""

    def __init__(self, words: str) -> None:
        path, _, rest = words.partition(": ")
        rule, _, way_out = rest.rpartition("; ")
        super().__init__(path, ABSENT, rule, way_out)


def _reach(head: str, port: int, join_seconds: float) -> socket.socket:
    """The head may start later than this node."""
    end = time.monotonic() + join_seconds
    while True:
        try:
            return socket.create_connection((head, port), timeout=10)
        except OSError as error:
            if time.monotonic() > end:
                raise FleetuneError(f"no answer from the first node, {head} port {port}: {error}") from None
            time.sleep(0.2)


class Head:
    """The first node. Raises `Disagreed` when the nodes must not start, the others being told the same."""

    def __init__(self, port: int, token: str, num_nodes: int, facts: Facts, join_seconds: float = JOIN_SECONDS) -> None:
        self._members: dict[int, _Wire] = {}
        self._facts = {0: facts}
        self._token, self._num_nodes = token, num_nodes
        self._listener = socket.create_server(("", port), backlog=min(num_nodes, 4096))
        self._gather(join_seconds)
        words = disagreement([self._facts[node] for node in sorted(self._facts)])
        for wire in self._members.values():
            wire.say(**({"stop": words} if words else {"go": True}))
        if words:
            self.leave(None)
            raise Disagreed(words)

    def _gather(self, join_seconds: float) -> None:
        end = time.monotonic() + join_seconds
        while len(self._facts) < self._num_nodes:
            self._listener.settimeout(max(0.1, end - time.monotonic()))
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                missing = [node for node in range(self._num_nodes) if node not in self._facts]
                told = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
                raise FleetuneError(
                    f"{len(missing)} of {self._num_nodes} nodes never came within {join_seconds:.0f} s (numbers {told})"
                ) from None
            connection.settimeout(30)
            self._admit(_Wire(connection))

    def _admit(self, wire: _Wire) -> None:
        """A stranger, or a node of another job that guessed the same port, is turned away."""
        message = wire.hear() or {}
        node = message.get("node")
        if message.get("token") != self._token or not isinstance(node, int) or not 0 < node < self._num_nodes:
            wire.socket.close()
            return
        try:
            self._facts[node] = Facts(**message["facts"])
        except (KeyError, TypeError):
            wire.socket.close()
            return
        wire.socket.settimeout(None)
        self._members[node] = wire

    def watch(self, on_down: Callable[[str], None]) -> None:
        def listen() -> None:
            selector = selectors.DefaultSelector()
            for node, wire in self._members.items():
                selector.register(wire.socket, selectors.EVENT_READ, node)
            while selector.get_map():
                for key, _ in selector.select():
                    selector.unregister(key.fileobj)  # a member has one thing to say
                    message = self._members[key.data].hear()
                    if message is None or "failed" in message:
                        host = self._facts[key.data].host
                        self._tell_down(f"{host}: {message['failed'] if message else 'is gone'}")
                        on_down(f"{host}: {message['failed'] if message else 'is gone'}")
                        return

        if self._members:
            threading.Thread(target=listen, daemon=True).start()

    def _tell_down(self, words: str) -> None:
        for wire in self._members.values():
            wire.say(down=words)

    def leave(self, failure: str | None) -> None:
        """The others go on saving where nothing failed: a connection that closes now must not take them down."""
        if failure:
            self._tell_down(f"{self._facts[0].host}: {failure}")
        else:
            for wire in self._members.values():
                wire.say(bye=True)
        self._listener.close()
