"""How things are on the NATS side: the server, the stream, the consumers, the dead letters.

:func:`look` asks and changes nothing, and judges nothing (:mod:`~celery_jetstream.diagnosis` does).
Runs in the connection's loop thread.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from .capabilities import Feature, lacking
from .config import Config
from .exceptions import NotConnectedError, PermissionDeniedError
from .session import NoResponders, Session
from .specs import filters
from .subjects import matches

__all__ = ("look", "nothing_known")

#: Seconds that one question may take, within those of the whole look.
ASK_TIMEOUT = 2.0
#: Messages come and go while they are counted; what is stuck is there each time.
STUCK_LOOKS, STUCK_PAUSE = 3, 0.2

NO_JETSTREAM = "nobody answers: JetStream is not enabled on this server"


def nothing_known(config: Config, consumers: Sequence[str]) -> dict[str, Any]:
    """A look that has found nothing out yet."""
    return {
        "unanswered": None,
        "unknown": [],
        "rtt_ms": None,
        "server": {
            "name": None,
            "version": None,
            "api_level": None,
            "cluster": None,
            "lacks": [],
            "error": None,
            "error_code": None,
        },
        "stream": {
            "name": config.stream_name,
            "exists": None,
            "messages": None,
            "bytes": None,
            "max_messages": None,
            "max_bytes": None,
            "subjects": [],
            "missing_subjects": [],
            "retention": None,
            "atomic": None,
            "replicas": None,
            "replicas_offline": [],
            "error": None,
        },
        "consumers": [
            {
                "name": name,
                "exists": None,
                "filter_subjects": [],
                "pending": None,
                "ack_pending": None,
                "max_ack_pending": None,
                "redelivered": None,
                "stuck": None,
                "max_deliver": None,
                "taken": None,
                "error": None,
            }
            for name in consumers
        ],
        "dead_letters": {"subject": config.dead_letter_subject, "count": None, "oldest": None},
    }


async def look(
    session: Session, config: Config, consumers: Sequence[str], denied: set[str], timeout: float
) -> dict[str, Any]:
    """What there is to know of what this app needs of NATS, as plain values.

    Never raises for NATS's sake. The keys are those of docs/reference/health.md.

    Args:
        session: the connection's.
        config: the settings.
        consumers: the durables that bring this app's messages.
        denied: subjects that our user may not ask; they are not asked, and those that are found
            out are added.
        timeout: seconds for all of it.
    """
    found = nothing_known(config, consumers)
    asker = _Asker(session, denied)
    try:
        await asyncio.wait_for(_look(asker, config, found), timeout)
    except asyncio.TimeoutError:
        found["unanswered"] = f"not all was answered in {timeout:g} s"
    except NotConnectedError as error:
        found["unanswered"] = str(error)
    found["unknown"] = [
        f"the NATS user may not publish to {subject}: what it answers is not known"
        for subject in sorted(denied)
    ]
    return found


async def _look(asker: _Asker, config: Config, found: dict[str, Any]) -> None:
    session, server = asker.session, found["server"]
    asked = time.monotonic()
    if await session.round_trip(ASK_TIMEOUT):  # two PINGs
        found["rtt_ms"] = round((time.monotonic() - asked) * 500, 2)
    server["name"], server["version"] = session.server_name, session.server_version
    server["cluster"] = session.cluster_name or None
    server["lacks"] = [_lack(feature, config) for feature in lacking(session.server_version)]
    info = await asker.ask("INFO")
    server["api_level"] = info.get("api", {}).get("level")  # from 2.11 on
    server["error"], server["error_code"] = info.get("error"), info.get("code")
    if server["error"]:
        return
    await _tell_stream(asker, config, found["stream"])
    for consumer in found["consumers"]:
        await _tell_consumer(asker, config, consumer, found["stream"])
    if found["stream"]["exists"] is not False:
        await _tell_dead_letters(asker, config, found["dead_letters"])


def _lack(feature: Feature, config: Config) -> dict[str, Any]:
    name = feature.setting.removeprefix("jetstream_")
    return {
        "feature": feature.name,
        "since": ".".join(map(str, feature.since)),
        "instead": feature.instead,
        "setting": feature.setting or None,
        "asked_for": bool(name and getattr(config, name)),
    }


async def _tell_stream(asker: _Asker, config: Config, stream: dict[str, Any]) -> None:
    info = await asker.ask(f"STREAM.INFO.{stream['name']}")
    stream["exists"], stream["error"] = _exists(info), info.get("error")
    if not stream["exists"]:
        return
    made, state = info["config"], info["state"]
    replicas = (info.get("cluster") or {}).get("replicas") or ()
    subjects = list(made.get("subjects") or ())
    stream.update(
        messages=state["messages"],
        bytes=state["bytes"],
        max_messages=_limit(made.get("max_msgs")),
        max_bytes=_limit(made.get("max_bytes")),
        subjects=subjects,
        missing_subjects=[
            subject
            for subject in config.subjects
            if not any(matches(pattern, subject) for pattern in subjects)
        ],
        retention=made["retention"],
        atomic=bool(made.get("allow_atomic")),
        replicas=made.get("num_replicas", 1),
        replicas_offline=[one["name"] for one in replicas if one.get("offline")],
    )


async def _tell_consumer(
    asker: _Asker, config: Config, consumer: dict[str, Any], stream: Mapping[str, Any]
) -> None:
    info = await asker.ask(f"CONSUMER.INFO.{config.stream_name}.{consumer['name']}")
    consumer["exists"], consumer["error"] = _exists(info), info.get("error")
    if not consumer["exists"]:
        return
    made = info["config"]
    pushes = bool(made.get("deliver_subject"))
    consumer.update(
        filter_subjects=list(filters(made)),
        pending=info["num_pending"],
        ack_pending=info["num_ack_pending"],
        max_ack_pending=_limit(made.get("max_ack_pending")),
        redelivered=info["num_redelivered"],
        max_deliver=_limit(made.get("max_deliver")),
        taken=bool(info.get("push_bound") if pushes else info.get("num_waiting")),
    )
    if stream["retention"] == "workqueue":
        consumer["stuck"] = await _stuck(asker, config.stream_name, consumer)


async def _stuck(asker: _Asker, stream: str, consumer: Mapping[str, Any]) -> int | None:
    """How many messages the stream has for a consumer that it will not deliver (again)."""
    least = None
    for number in range(STUCK_LOOKS):
        if number:
            await asyncio.sleep(STUCK_PAUSE)
        stored = 0
        for subject in consumer["filter_subjects"] or [">"]:
            count = await _count(asker, stream, subject)
            if count is None:
                return least
            stored += count
        info = await asker.ask(f"CONSUMER.INFO.{stream}.{consumer['name']}")
        if not _exists(info):
            return least
        left = max(0, stored - info["num_pending"] - info["num_ack_pending"])
        least = left if least is None else min(least, left)
        if not least:
            break
    return least


async def _tell_dead_letters(asker: _Asker, config: Config, dead: dict[str, Any]) -> None:
    subject = config.dead_letter_subject
    dead["count"] = await _count(asker, config.stream_name, subject)
    if dead["count"]:
        operation = f"STREAM.MSG.GET.{config.stream_name}"
        info = await asker.ask(operation, seq=1, next_by_subj=subject)
        if "message" in info:
            stored = _moment(info["message"]["time"])
            age = (datetime.now(timezone.utc) - stored).total_seconds()
            dead["oldest"] = round(max(0.0, age), 1)


async def _count(asker: _Asker, stream: str, subject: str) -> int | None:
    info = await asker.ask(f"STREAM.INFO.{stream}", subjects_filter=subject)
    return sum((info["state"].get("subjects") or {}).values()) if _exists(info) else None


def _limit(value: int | None) -> int | None:
    """The server says -1 (or 0) where there is none."""
    return value if value is not None and value > 0 else None


def _moment(text: str) -> datetime:
    """The server's time has nine digits, and Python before 3.11 reads six."""
    return datetime.fromisoformat(re.sub(r"(?:(\.\d{1,6})\d*)?Z$", _six, text))


def _six(found: re.Match[str]) -> str:
    return f"{found[1].ljust(7, '0') if found[1] else ''}+00:00"


# -- asking ----------------------------------------------------------------------------------------


class _Asker:
    """Asks JetStream; what our user may not ask is found out once for a session."""

    def __init__(self, session: Session, denied: set[str]) -> None:
        self.session = session
        self._denied = denied

    async def ask(self, operation: str, **request: Any) -> dict[str, Any]:
        """JetStream's answer; ``error`` in it is text; empty where our user may not ask."""
        subject = f"$JS.API.{operation}"
        if subject in self._denied:
            return {}
        body = json.dumps(request).encode() if request else b""
        try:
            message = await self.session.ask(subject, body, timeout=ASK_TIMEOUT)
        except NoResponders:
            return {"error": NO_JETSTREAM, "code": 503}
        except PermissionDeniedError:
            self._denied.add(subject)
            return {}
        except NotConnectedError as error:
            if self.session.lost.is_set():
                raise
            return {"error": str(error)}
        answer: dict[str, Any] = json.loads(message.data)
        if refusal := answer.get("error"):
            return {
                "error": refusal.get("description", str(refusal)),
                "code": refusal.get("code"),
            }
        return answer


def _exists(answer: Mapping[str, Any]) -> bool | None:
    if answer.get("code") == 404:
        return False
    return True if "config" in answer else None
