"""``jetstream.doctor()``: what is set up so that it will cost somebody days, and what to do.

Facts are gathered first, from NATS, Celery and the database side by side and each in bounded time;
then every check decides about them. What could not be found out skips the checks that need it, and
says why.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import checks_celery, checks_database, checks_nats, checks_stream, facts_celery, facts_nats
from .exceptions import CeleryJetStreamError, ConfigurationError
from .facts import Facts, HandlerFacts, Unknown
from .findings import Check, Finding
from .permissions import ROLES
from .threads import in_native_thread, wait

__all__ = ("CHECKS", "SETTINGS", "Report", "examine")

logger = logging.getLogger(__name__)

#: The code of what is said where the settings or the handlers cannot be used at all.
SETTINGS = "settings"
CHECKS: tuple[Check, ...] = (
    *checks_nats.CHECKS,
    *checks_stream.CHECKS,
    *checks_celery.CHECKS,
    *checks_database.CHECKS,
)
NATS = ("server", "account", "stream", "consumers", "plan", "permissions", "NATS")
DATABASE = ("outbox", "inbox", "database", "database clock")


@dataclass(frozen=True)
class Report:
    """What the doctor found, in the order of the checks."""

    findings: tuple[Finding, ...]

    def of(self, severity: str) -> list[Finding]:
        """The findings of one severity: ``error``, ``warning``, ``ok`` or ``skipped``."""
        return [finding for finding in self.findings if finding.severity == severity]

    @property
    def errors(self) -> list[Finding]:
        """What loses events, stands still, or runs twice."""
        return self.of("error")

    @property
    def warnings(self) -> list[Finding]:
        """What works, and will cost somebody a day."""
        return self.of("warning")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as ``jetstream doctor --json`` prints them."""
        return {
            "healthy": not self.errors,
            **{name: len(self.of(name)) for name in ("error", "warning", "ok", "skipped")},
            "findings": [finding.as_dict() for finding in self.findings],
        }


def examine(jetstream: Any, timeout: float = 10.0, monitor: str = "", role: str = "run") -> Report:
    """Looks at all that it can, and changes nothing; never raises for a server's sake.

    Args:
        jetstream: the app's :class:`~celery_jetstream.JetStream`.
        timeout: seconds for all of it.
        monitor: URLs of the monitoring ports of the nats-servers (``http://nats:8222``, with
            commas), which say how often they sync to disk; "" to do without.
        role: what its NATS user is to be allowed: ``run``, ``operator`` or ``admin``.

    Raises:
        ValueError: there is no such role.
    """
    if role not in ROLES:
        raise ValueError(f"role is {role!r}, and must be one of {', '.join(ROLES)}")
    try:
        jetstream.check()
    except CeleryJetStreamError as error:
        if not _has_settings(jetstream):
            why = "Nothing starts with them, and nothing else can be looked at."
            remedy = "change the settings as it says"
            return Report((Finding(SETTINGS, "error", str(error), why, remedy),))
        wrong: tuple[Finding, ...] = (
            Finding(SETTINGS, "error", str(error), "No worker starts so.", "change it as it says"),
        )
    else:
        wrong = (Finding(SETTINGS, "ok", "settings and handlers can be used"),)
    facts = gather(jetstream, timeout, monitor, role)
    return Report((*wrong, *(finding for check in CHECKS for finding in _apply(check, facts))))


def _has_settings(jetstream: Any) -> bool:
    try:
        jetstream.config  # noqa: B018 - whether it can be read
    except ConfigurationError:
        return False
    return True


def _apply(check: Check, facts: Facts) -> list[Finding]:
    """What a check finds; a fault of its own, or an answer of a form unknown, ends no other."""
    try:
        return list(check(facts))
    except Exception as error:
        logger.exception("the check %s failed", check.code)
        return [Finding(check.code, "skipped", f"the check failed: {error!r}")]


# -- facts -----------------------------------------------------------------------------------------


def gather(jetstream: Any, timeout: float, monitor: str = "", role: str = "run") -> Facts:
    """All facts that can be had in ``timeout`` seconds; NATS, Celery and the database at once."""
    app, config = jetstream.app, jetstream.config
    ends = time.monotonic() + timeout
    unanswered = Unknown(f"not answered in {timeout:g} s (--timeout)")
    found: dict[str, Any] = dict.fromkeys((*NATS, *DATABASE, "workers", "syncs"), unanswered)
    handlers = _tried(partial(facts_celery.handler_facts, app))
    uses_inbox = config.use_inbox or _has_inbox(handlers)

    asked: list[tuple[tuple[str, ...], Future[Any]]] = [
        (NATS, jetstream.connection.submit(_look_at_nats, jetstream, timeout, role, found)),
        (("workers",), in_native_thread(partial(_into, found, "workers", _workers(app, timeout)))),
        (
            ("syncs",),
            in_native_thread(
                partial(_into, found, "syncs", partial(facts_nats.syncs, monitor, timeout / 2))
            ),
        ),
    ]
    if config.has_database:
        asked.append((DATABASE, in_native_thread(partial(_database, jetstream, uses_inbox, found))))
    else:
        found |= dict.fromkeys(DATABASE, Unknown("there is no database (jetstream_database_url)"))
    for names, future in asked:
        _await(future, ends - time.monotonic(), names, unanswered, found)
    learned = dict(found)  # what comes later is not waited for
    clocks = {"NATS": learned.pop("NATS"), "the database": learned.pop("database clock")}
    return Facts(
        config=config,
        celery=facts_celery.settings(app),
        handlers=handlers,
        flush=_tried(partial(facts_celery.flush_facts, app, config.outbox_queue)),
        clocks=clocks,
        role=role,
        **learned,
    )


def _has_inbox(handlers: tuple[HandlerFacts, ...] | Unknown) -> bool:
    return not isinstance(handlers, Unknown) and any(handler.has_inbox for handler in handlers)


def _tried(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:  # a router of the user's may raise anything
        return error if isinstance(error, Unknown) else Unknown(_said(error))


def _into(found: dict[str, Any], name: str, function: Callable[[], Any]) -> None:
    found[name] = _tried(function)


def _workers(app: Any, timeout: float) -> Callable[[], Any]:
    return partial(facts_celery.workers, app, timeout * 0.8)


async def _look_at_nats(jetstream: Any, timeout: float, role: str, found: dict[str, Any]) -> None:
    look = facts_nats.look(jetstream.connection, jetstream.config, jetstream, role, found)
    await asyncio.wait_for(look, timeout)


def _database(jetstream: Any, uses_inbox: bool, found: dict[str, Any]) -> None:
    from . import facts_database  # and with it SQLAlchemy

    facts_database.look(jetstream, uses_inbox, found)


def _await(
    future: Future[Any],
    timeout: float,
    names: tuple[str, ...],
    unanswered: Unknown,
    found: dict[str, Any],
) -> None:
    """Waits for what is being asked; where it ended early, the rest of it is unknown for that."""
    try:
        wait(future, max(0.01, timeout))
    except FutureTimeoutError:
        return
    except Exception as error:
        for name in names:
            if found[name] is unanswered:
                found[name] = Unknown(_said(error))


def _said(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]
