"""What one process has of an app's JetStream: a connection, and what stands on it.

A forked child makes its own. Outbox and inbox are made when they are first asked for, so that
SQLAlchemy is there for those only who use it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING

from .aside import Aside
from .breaker import Breaker
from .config import Config
from .connection import Connection
from .exceptions import ConfigurationError, NotConnectedError
from .publisher import Publisher
from .request import Keeper
from .settler import Settler

if TYPE_CHECKING:
    from .database import Engines
    from .inbox import Inbox
    from .outbox import Outbox

__all__ = ("Runtime",)

logger = logging.getLogger(__name__)


class Runtime:
    """The parts of one process. Thread-safe.

    Args:
        config: the settings.
        ensure_topology: awaited in the loop thread where a stream is missing.
        send_flush: sends the task that flushes the outbox.
    """

    def __init__(
        self,
        config: Config,
        ensure_topology: Callable[[], Awaitable[None]],
        send_flush: Callable[[], None],
    ) -> None:
        self._config = config
        self._send_flush = send_flush
        self._lock = threading.RLock()  # a model of the user's is imported with it held
        self._engines: Engines | None = None
        self._outbox: Outbox | None = None
        self._inbox: Inbox | None = None
        self.connection = Connection(config)
        self.publisher = Publisher(config, self.connection, ensure_topology)
        self.settler = Settler(config, self.connection, self.publisher)
        claimant = f"{socket.gethostname()}-{os.getpid()}"
        self.keeper = Keeper(self.connection, self.settler, claimant=claimant)
        self.aside = Aside()

    @property
    def outbox(self) -> Outbox:
        """The outbox.

        Raises:
            ConfigurationError: it has no database.
        """
        if self._outbox is None:
            with self._lock:
                if self._outbox is None:
                    self._outbox = self._make_outbox()
        return self._outbox

    @property
    def inbox(self) -> Inbox:
        """The inbox.

        Raises:
            ConfigurationError: it has no database.
        """
        if self._inbox is None:
            with self._lock:
                if self._inbox is None:
                    self._inbox = self._make_inbox()
        return self._inbox

    @property
    def breaker(self) -> Breaker | None:
        """The outbox's; None where this process has not used its outbox yet."""
        return None if self._outbox is None else self._outbox.flusher.breaker

    def _make_outbox(self) -> Outbox:
        with _needed(self._config, "outbox"):
            from .outbox import Outbox
        return Outbox(
            self._config, self.connection, self.publisher, self._send_flush, self._its_engines()
        )

    def _make_inbox(self) -> Inbox:
        with _needed(self._config, "inbox"):
            from .inbox import Inbox
        return Inbox(self._config, self._its_engines())

    def _its_engines(self) -> Engines:
        from .database import Engines

        if self._engines is None:
            self._engines = Engines(self._config)
        return self._engines

    def close(self, timeout: float) -> None:
        """Waits for what is on its way and closes, ``timeout`` seconds at the most."""
        deadline = time.monotonic() + timeout
        left = self.aside.drain(timeout * 0.4)
        if left:
            logger.warning("%d ended tasks are not settled at the end; they come again", left)
        if self._outbox is not None:
            self._outbox.close(timeout * 0.2)
        if self._inbox is not None:
            self._inbox.close(timeout * 0.1)
        if self.settler.pending:
            with contextlib.suppress(NotConnectedError):
                missing = self.settler.drain(max(0.0, deadline - time.monotonic()) * 0.8)
                if missing:
                    logger.warning("%d settlements are unconfirmed at the end", missing)
        if self._engines is not None:
            self._engines.close()
        self.connection.close(max(0.5, deadline - time.monotonic()))


@contextlib.contextmanager
def _needed(config: Config, what: str) -> Iterator[None]:
    """Says what is missing where the outbox or the inbox cannot be."""
    if not config.has_database:
        raise ConfigurationError(
            f"there is no {what}: set jetstream_database_url or jetstream_session_factory",
            setting="jetstream_database_url",
        )
    try:
        yield
    except ImportError as error:
        raise ConfigurationError(
            f'the {what} needs SQLAlchemy: pip install "celery-jetstream[sqlalchemy]" ({error})'
        ) from error
