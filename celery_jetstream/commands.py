"""What the commands share: their app, and what a daemon is beside its work."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from typing import Any, Protocol

import click
from celery.platforms import create_pidlock, maybe_drop_privileges, signals

from . import readers

__all__ = (
    "ALL",
    "AS_OPERATOR",
    "DRY_RUN",
    "JSON",
    "Stopping",
    "age_text",
    "cut",
    "daemon",
    "dead_letters_of",
    "denials_said_once",
    "duration",
    "echo_json",
    "filter_of",
    "filter_options",
    "http_address",
    "inbox_of",
    "jetstream_of",
    "moment",
    "outbox_of",
    "plain",
    "progress_of",
    "stop_on_signals",
)

#: ``outbox_filter.STATES``, without importing SQLAlchemy for ``--help``.
STATES = (
    *("pending", "sent", "failed", "exception", "cancelled"),
    *("publishing", "retrying", "parked", "scheduled"),
)


class _Running(Protocol):
    def stop(self) -> None: ...


def jetstream_of(app: Any) -> Any:
    """The app's JetStream."""
    from .extension import JetStream

    found = getattr(app, "jetstream", None)
    if not isinstance(found, JetStream):
        raise click.ClickException(
            f"the Celery app {app.main!r} has no JetStream: add JetStream(app) where it is made"
        )
    return found


@contextlib.contextmanager
def daemon(
    app: Any,
    *,
    loglevel: Any,
    logfile: str | None = None,
    pidfile: str | None = None,
    uid: str | None = None,
    gid: str | None = None,
    umask: str | None = None,
    **_: Any,
) -> Iterator[None]:
    """Sets up what the options of ``CeleryDaemonCommand`` say; our errors end with status 1."""
    from .exceptions import CeleryJetStreamError

    maybe_drop_privileges(uid=uid, gid=gid)
    if umask:
        os.umask(int(umask, 8))
    app.loader.init_worker()
    app.finalize()
    app.log.setup(loglevel=loglevel, logfile=logfile)
    lock = create_pidlock(pidfile) if pidfile else None
    try:
        yield
    except CeleryJetStreamError as error:
        raise click.ClickException(str(error)) from error
    finally:
        if lock is not None:
            lock.release()


def stop_on_signals(running: _Running) -> None:
    """The first signal stops in bounded time; the second ends the process there and then."""

    def stop(signum: int, frame: object) -> None:
        signals["SIGTERM"] = signals["SIGINT"] = end
        running.stop()

    def end(signum: int, frame: object) -> None:
        os._exit(128 + signum)

    for number in (signal.SIGTERM, signal.SIGINT):
        signals[number] = stop


def _http_address(value: Any) -> Any:
    try:
        return readers.http_address(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} {error}") from None


def http_address(default: str) -> dict[str, Any]:
    """What the option ``--http-address`` is, but for its name."""
    text = "Serve /livez, /readyz, /status and /metrics there: 8080, :8080 (of 127.0.0.1), "
    return {"type": _http_address, "help": f"{text}host:port. Default: {default}."}


class Stopping:
    """Asked between two steps whether to end early; :func:`stop_on_signals` has it say so."""

    def __init__(self) -> None:
        self._stopped = False

    def __call__(self) -> bool:
        """Whether it is to end."""
        return self._stopped

    def stop(self) -> None:
        """From now on it is to end."""
        self._stopped = True


# -- of outbox and inbox -----------------------------------------------------------------------

JSON = click.option("--json", "as_json", is_flag=True, help="For machines.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
#: Behind a denial, in place of "give the command again".
AS_OPERATOR = ", or give the command as a user who may: the operator (--role operator there)"
ALL = click.option("--all", "everything", is_flag=True, help="Every event; else give a filter.")


def outbox_of(ctx: click.Context, as_json: bool = False) -> AbstractContextManager[Any]:
    """The app's outbox; our errors are said in one line (or as JSON), and end with status 1."""
    return _of(ctx, "outbox", as_json)


def inbox_of(ctx: click.Context, as_json: bool = False) -> AbstractContextManager[Any]:
    """The app's inbox, as above."""
    return _of(ctx, "inbox", as_json)


def dead_letters_of(ctx: click.Context, as_json: bool = False) -> AbstractContextManager[Any]:
    """The app's dead letters, as above."""
    return _of(ctx, "dead_letters", as_json)


@contextlib.contextmanager
def _of(ctx: click.Context, name: str, as_json: bool) -> Iterator[Any]:
    from .exceptions import CeleryJetStreamError, PermissionDeniedError

    jetstream = jetstream_of(ctx.obj.app)
    try:
        with denials_said_once():
            yield getattr(jetstream, name)
    except CeleryJetStreamError as error:
        if as_json:
            click.echo(json.dumps({"error": str(error)}))
            sys.exit(1)
        denied = name == "dead_letters" and isinstance(error, PermissionDeniedError)
        then = AS_OPERATOR if denied else ""
        raise click.ClickException(f"{error}{then}") from error
    finally:
        jetstream.close()


@contextlib.contextmanager
def denials_said_once() -> Iterator[None]:
    """By the command; where no log is set up, ``logging`` would write them to stderr as well."""
    log, handler = logging.getLogger("celery_jetstream.session"), logging.NullHandler()
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


@contextlib.contextmanager
def progress_of(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """What a command tells its progress to; None where nobody looks at it."""
    if not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(
        length=1, label=label, file=sys.stderr, show_pos=True, show_percent=True
    ) as bar:

        def show(done: int, total: int) -> None:
            if not done:  # they are counted, and the work begins
                bar.start = bar.last_eta = time.time()
            bar.length = max(1, done, total)
            bar.update(done - bar.pos)

        yield show


def duration(value: Any) -> float:
    """The type of an option: 30, 30s, 5m, 1h, 2d."""
    try:
        return readers.duration(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} {error}") from None


def moment(value: Any) -> Any:
    """The type of an option: so long ago, or a time (of UTC where it has no offset)."""
    with contextlib.suppress(ValueError):
        return readers.duration(value)
    try:
        found = datetime.fromisoformat(value.replace("Z", "+00:00"))
    except ValueError:
        raise click.BadParameter(
            f"{value!r} must be a duration (1h) or a time (2026-01-31T12:00Z)"
        ) from None
    return found if found.tzinfo else found.replace(tzinfo=timezone.utc)


_FILTERS = (
    click.option("--status", type=click.Choice(STATES), help="The state that it is in."),
    click.option("--type", "event_type", help="An event type, or a pattern: user.*, order.>"),
    click.option("--key", "ordering_key", help="Its ordering key."),
    click.option("--subject", help="Its subject."),
    click.option("--id", "event_id", help="Its event_id."),
    click.option("--older-than", type=duration, help="Written so long ago or longer: 5m, 1h, 2d."),
    click.option("--newer-than", type=duration, help="Written so long ago or later."),
)


def filter_options(command: Any) -> Any:
    """Adds the options of a filter, for :func:`filter_of`."""
    for option in reversed(_FILTERS):
        command = option(command)
    return command


def filter_of(options: dict[str, Any]) -> Any:
    """The filter that these options are; others are left alone."""
    from .exceptions import SubjectError
    from .outbox_filter import Filter

    try:
        return Filter(**{name: options[name] for name in Filter.__dataclass_fields__})
    except SubjectError as error:
        raise click.BadParameter(str(error), param_hint="--type") from None


# -- output ------------------------------------------------------------------------------------


def echo_json(value: Any) -> None:
    """One line of JSON; what is no UTF-8, a lone surrogate, as its escape."""
    text = json.dumps(value, ensure_ascii=False)
    click.echo(text.encode(errors="backslashreplace").decode())


def plain(text: str) -> str:
    """For a terminal: what others wrote in events and errors gives it no orders."""
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def cut(text: str, width: int) -> str:
    """As wide as a column is, and plain."""
    text = plain(text)
    return f"{text:{width}}" if len(text) <= width else f"{text[: width - 1]}…"


def age_text(seconds: float | None) -> str:
    """Five characters at the most: ``45s``, ``12m``, ``30h``, ``12d``."""
    if seconds is None:
        return "-"
    for unit, size, most in (("s", 1, 120), ("m", 60, 7200), ("h", 3600, 172800)):
        if seconds < most:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds // 86400)}d"
