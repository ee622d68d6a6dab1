"""nats-py's client, with the things that its public API does not give.

One is opened and ends with its :class:`~celery_jetstream.session.Session`. Used in the connection's
loop thread only.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import socket
import struct
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import nats.aio.client
from nats.aio.msg import Msg

from .exceptions import ConnectionRefusedByServer

__all__ = ("Client", "clients")

logger = logging.getLogger(__name__)

#: Unacknowledged bytes for this long (milliseconds) make the kernel give the socket up (Linux).
TCP_USER_TIMEOUT_MS = 5_000

#: All clients of this process, for a forked child to close its copies of their sockets.
clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _expiry(jwt: str) -> float | None:
    """When a JWT expires; None where it does not, or is none."""
    try:
        claims = jwt.split(".")[1]
        expires = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["exp"]
        return float(expires)
    except (IndexError, KeyError, TypeError, ValueError):
        return None


#: tcpi_bytes_acked and tcpi_notsent_bytes of Linux's struct tcp_info, which grows at its end only.
_TCP_INFO = struct.Struct("=120xQ16xI")


class Client(nats.aio.client.Client):
    """nats-py's client with the things that its public API does not give.

    What is not public of nats-py is used here only (tried on 2.10 to 2.16):
    ``_connect_command``, the tasks, ``_status``, ``_transport._io_writer``, ``_pending`` and
    ``_flush_queue``, ``_process_msg``, ``_build_message``, ``_process_headers``, ``_process_info``,
    ``_pings_outstanding``, and a subscription's ``_id``; and of asyncio's stream protocol
    ``_over_ssl``.
    """

    on_info: Callable[[Mapping[str, Any]], None] | None = None

    def __init__(self, *, tls_wanted: bool) -> None:
        super().__init__()
        self._tls_wanted = tls_wanted
        #: What is called for a subscription's messages, by its number.
        self.receivers: dict[int, Callable[[Msg], None]] = {}
        self._taken = 0
        #: What the server said of itself last; nats-py keeps what it said first.
        self.info: Mapping[str, Any] = {}
        #: When the user JWT that was sent expires, in seconds since 1970.
        self.expires: float | None = None
        clients.add(self)

    def _connect_command(self) -> bytes:
        """Refuses to send credentials in clear text where TLS was asked for."""
        if self._tls_wanted and not self.encrypted:
            raise ConnectionRefusedByServer(
                "TLS was asked for (a tls:// URL or jetstream_nats_options['tls']), but the "
                "server does not offer it: nothing was sent. Turn TLS on at the server, or use "
                "a nats:// URL without TLS options."
            )
        self._know_of_tls()
        command: bytes = super()._connect_command()
        self.expires = _expiry(json.loads(command.split(b" ", 1)[1]).get("jwt", ""))
        return command

    def _know_of_tls(self) -> None:
        """Tells asyncio's protocol that it is over TLS, which it learns only with a transport.

        nats-py makes it and upgrades to TLS, and so it has none: at each EOF it would ask for the
        connection to be half open, and asyncio would warn that TLS has no such thing.
        """
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None and self.encrypted:
            writer.transport.get_protocol()._over_ssl = True

    async def _process_info(self, info: dict[str, Any], *args: Any, **options: Any) -> None:
        self.info = info
        await super()._process_info(info, *args, **options)
        if self.on_info is not None:
            self.on_info(info)

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        """Hands a message over at once: nats-py's queue and task cost as much as all the rest.

        So none waits anywhere unseen when we stop. Whatever goes wrong ends here: an error would
        end the read loop, and the message would come again and end the next one.
        """
        receive = self.receivers.get(sid)
        if receive is None:
            await super()._process_msg(sid, subject, reply, data, headers)
            return
        try:
            self.stats["in_msgs"] += 1
            found = await self._process_headers(headers) if headers else None
            receive(self._build_message(sid, subject, reply, data, found))
        except Exception:
            logger.exception("receiving a message on %s failed", subject.decode(errors="replace"))

    def put(self, frame: bytes) -> None:
        """Appends to what is to be written; :meth:`kick` writes it."""
        self._pending.append(frame)
        self._pending_data_size += len(frame)

    def kick(self, written: asyncio.Future[Any]) -> None:
        """Has all that is pending written, and ``written`` done when the socket has taken it.

        Raises:
            asyncio.QueueFull: too many wait for that already.
        """
        assert self._flush_queue is not None, "not connected"
        self._flush_queue.put_nowait(written)

    @property
    def alive(self) -> bool:
        """Connected, and all still runs that reads, hands on, writes and asks for life.

        A callback that raises ``CancelledError`` ends its subscription without a word.
        """
        tasks = [self._reading_task, self._flusher_task, self._ping_interval_task]
        callers = [subscription._wait_for_msgs_task for subscription in self._subs.values()]
        tasks += [task for task in callers if task is not None]
        return bool(self.is_connected and all(task and not task.done() for task in tasks))

    @property
    def encrypted(self) -> bool:
        """What is sent now is sent through TLS."""
        server = self._current_server
        over_wss = server is not None and server.uri.scheme == "wss"
        return over_wss or self._socket_info("ssl_object") is not None

    def tune_socket(self) -> None:
        """Lets the kernel notice a hung peer, also while data is unsent."""
        sock = self._socket_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)

    def is_stuck(self) -> bool:
        """Bytes wait to be sent, and the peer has taken none since the last call (Linux).

        The kernel knows, also under TLS. A peer that takes them slowly is none that hangs, but
        answers a ping only when it has read what was sent before: it is given time.
        """
        sock = self._socket_info("socket")
        if sock is None or not hasattr(socket, "TCP_INFO"):
            return False
        try:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
            taken, unsent = _TCP_INFO.unpack_from(info)
        except (OSError, struct.error):  # closed, or a kernel that does not say
            return False
        moves, self._taken = taken > self._taken, taken
        if unsent and moves:
            self._pings_outstanding = 0
        return bool(unsent) and not moves

    @property
    def address(self) -> str:
        """Where the server is, as ``host:port``; empty where that is not known."""
        peer = self._socket_info("peername")
        if not peer:
            return ""
        host, port = peer[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def abort(self) -> None:
        """Closes the socket now, sent or unsent, without waiting for the peer."""
        self._status = nats.aio.client.Client.CLOSED
        tasks = [self._reading_task, self._ping_interval_task, self._flusher_task]
        tasks += [subscription._wait_for_msgs_task for subscription in self._subs.values()]
        for task in tasks:
            if task is not None:
                task.cancel()
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    def fileno(self) -> int:
        """The socket's descriptor; -1 where there is none."""
        sock = self._socket_info("socket")
        return -1 if sock is None else int(sock.fileno())

    def _socket_info(self, name: str) -> Any:
        writer = getattr(self._transport, "_io_writer", None)
        return None if writer is None else writer.get_extra_info(name)
