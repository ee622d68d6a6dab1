"""What the tests ask a connection, and a server that only listens."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from typing import Any

from celery_jetstream.connection import Connection
from celery_jetstream.exceptions import NotConnectedError
from celery_jetstream.session import Session
from tests.servers import NatsServer

SECRET = "s3cr3t-0f-0urs"


def url_of(server: NatsServer, user: str = "", scheme: str = "nats") -> str:
    return f"{scheme}://{user and f'{user}@'}127.0.0.1:{server.port}"


def ask(connection: Connection, timeout: float = 5.0) -> dict[str, Any]:
    """One exchange with JetStream: proof that the connection works."""

    async def account() -> dict[str, Any]:
        session = await connection.session(timeout)
        answer: dict[str, Any] = json.loads((await session.ask("$JS.API.INFO")).data)
        return answer

    return connection.run(account)


def works(connection: Connection) -> bool:
    try:
        return "error" not in ask(connection, 0.5)
    except NotConnectedError:
        return False


def session_of(connection: Connection) -> Session:
    return connection.run(connection.session)


def fill(connection: Connection, size: int = 16_000_000) -> None:
    """Writes more than a peer that reads nothing can take; call it in the loop thread."""
    session = connection._session
    assert session is not None
    message = b"PUB nobody.there 1000\r\n%s\r\n" % (b"x" * 1000)
    session.client._transport._io_writer.write(message * (size // 1000))


class RecordingServer:
    """A TCP server that may greet as NATS does, and keeps what it is told; answers nothing."""

    def __init__(
        self, greeting: dict[str, Any] | None, *, hang_up: bool = False, port: int = 0
    ) -> None:
        self.greeting = greeting
        self.hang_up = hang_up
        self.received = b""
        self.connections = 0
        self.times: list[float] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(peer)
            self.connections += 1
            self.times.append(time.monotonic())
            with contextlib.suppress(OSError):  # closed, by the client or with this server
                self._greet(peer)

    def _greet(self, peer: socket.socket) -> None:
        if self.greeting is not None:
            peer.sendall(b"INFO " + json.dumps(self.greeting).encode() + b"\r\n")
        if self.hang_up:
            if self.greeting is not None:
                peer.recv(4096)
            peer.close()
        else:
            threading.Thread(target=self._read, args=(peer,), daemon=True).start()

    def _read(self, peer: socket.socket) -> None:
        try:
            while data := peer.recv(4096):
                self.received += data
        except OSError:
            pass

    def __enter__(self) -> RecordingServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for peer in self._open:
            peer.close()


INFO = {"server_id": "x", "version": "2.15.0", "max_payload": 1048576, "headers": True, "proto": 1}
