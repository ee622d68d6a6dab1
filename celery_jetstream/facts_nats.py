"""What the doctor finds out about NATS: asked in the loop thread, one question after the other.

Nothing is changed. What a user must be allowed to do is tried in a form that the server refuses
for another reason than the permission: a publish that expects another stream, a pull with a
heartbeat that is too long, an ack of a message that there will never be.
"""

from __future__ import annotations

import json
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import datetime, timezone
from functools import partial
from ssl import cert_time_to_seconds
from types import MappingProxyType
from typing import Any

from nats.aio.msg import Msg

from . import topology
from .config import Config
from .consumers import stream_spec
from .exceptions import CeleryJetStreamError, NotConnectedError, PermissionDeniedError
from .facts import Clock, Permission, ServerFacts, Unknown
from .permissions import Role, by_role
from .preflight import ELSEWHERE
from .session import NoResponders, Session
from .specs import ConsumerSpec

__all__ = ("look", "syncs")

#: Seconds for one answer; a denial is known earlier.
ANSWER = 2.0
#: A sequence that no stream reaches, and a stream that nobody has.
NEVER, NOWHERE = 2**62, ELSEWHERE["Nats-Expected-Stream"]


async def look(
    connection: Any, config: Config, jetstream: Any, role: str, found: dict[str, Any]
) -> None:
    """Puts what it learns into ``found``, under the names that :class:`.Facts` has for it.

    ``role`` is what our user is to be allowed: one of :data:`.ROLES`.

    Raises:
        NotConnectedError: there is no connection, or it was lost.
    """
    session = await connection.session(ANSWER)
    found["server"] = ServerFacts(
        name=session.server_name,
        version=session.server_version,
        cluster=session.cluster_name,
        max_payload=session.client.max_payload,
        expiries=dict(_expiries(session)),
    )
    specs = await jetstream.consumers()
    roles = by_role(config, specs)
    told = partial(_api, session, roles)
    found["account"] = await told("INFO")
    before = time.time()
    found["stream"] = stream = await told(f"STREAM.INFO.{config.stream_name}")
    found["NATS"] = _clock(stream, before, time.time(), session.server_version)
    found["consumers"] = {
        spec.durable: await told(f"CONSUMER.INFO.{spec.stream}.{spec.durable}") for spec in specs
    }
    found["plan"] = await _plan(session, config, specs, roles)
    tried = _permissions(session, roles[role])
    found["permissions"] = tuple([one async for one in tried])


def _expiries(session: Session) -> Iterator[tuple[str, float]]:
    now, client = time.time(), session.client
    if client.expires is not None:
        yield "the user's JWT", client.expires - now
    tls = client._socket_info("ssl_object")
    certificate = tls.getpeercert() if tls is not None else None  # empty where it is not verified
    if certificate and "notAfter" in certificate:
        yield "the server's certificate", cert_time_to_seconds(certificate["notAfter"]) - now


async def _api(
    session: Session, roles: Mapping[str, Role], operation: str
) -> dict[str, Any] | Unknown:
    subject = f"$JS.API.{operation}"
    try:
        answer: dict[str, Any] = json.loads((await _ask(session, subject, roles=roles)).data)
    except (Unknown, NoResponders) as error:
        return _unknown(error)
    if refusal := answer.get("error"):
        return Unknown(f"{operation}: {refusal.get('description', refusal)}")
    return answer


def _unknown(error: Unknown | NoResponders) -> Unknown:
    if isinstance(error, Unknown):
        return error
    return Unknown("nobody answers: JetStream is not enabled on this server, or for this account")


async def _plan(
    session: Session, config: Config, specs: tuple[ConsumerSpec, ...], roles: Mapping[str, Role]
) -> Any:
    async def api(operation: str, request: Mapping[str, Any]) -> dict[str, Any]:
        body = json.dumps(request).encode() if request else b""
        try:
            answer = await _ask(session, f"$JS.API.{operation}", body, roles=roles)
        except NoResponders:
            return {"error": {"code": 503}}
        result: dict[str, Any] = json.loads(answer.data)
        return result

    try:
        return await topology.plan(api, stream_spec(config), *specs)
    except Unknown as unknown:
        return unknown
    except NotConnectedError:
        raise
    except CeleryJetStreamError as error:
        return str(error)


# -- asking ----------------------------------------------------------------------------------------


async def _ask(
    session: Session,
    subject: str,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    *,
    roles: Mapping[str, Role] = MappingProxyType({}),
) -> Msg:
    """As ``Session.ask``; one question that has no answer is no reason to end.

    Of these roles it names one that may, where ours may not.

    Raises:
        Unknown: our user may not, or there was no answer.
        NoResponders: nobody hears it.
        NotConnectedError: the connection was lost.
    """
    try:
        return await session.ask(subject, body, headers, timeout=ANSWER)
    except NoResponders:
        raise
    except PermissionDeniedError as error:
        may = next((name for name, role in roles.items() if error.subject in role.publish), None)
        then = f": to see it, run the doctor as the {may} (--role {may})" if may else ""
        raise Unknown(f"the NATS user may not {error.operation} {error.subject}{then}") from None
    except NotConnectedError as error:
        if session.lost.is_set():
            raise
        raise Unknown(str(error)) from None


async def _permissions(session: Session, role: Role) -> AsyncIterator[Permission]:
    for subject in role.publish:
        if subject.startswith("$JS.FC."):  # of what was pushed, and of nothing else
            continue
        refused = None
        try:
            await _ask(session, *_harmless(subject))
        except Unknown as unknown:
            refused = str(unknown)
        except NoResponders:  # no stream, or no consumer: said elsewhere
            pass
        yield Permission(what=role.why(subject), error=refused)
    for subject in role.subscribe:
        if " " in subject or not subject.startswith("$JS."):  # it would get some; we hear answers
            continue
        denied: list[PermissionDeniedError] = []
        session.on_denial(subject, denied.append)
        subscription = await session.subscribe(subject, lambda _: None)
        await session.round_trip(ANSWER)
        await session.unsubscribe(subscription)
        refused = f"the NATS user may not subscribe to {subject}" if denied else None
        yield Permission(what=role.why(subject), error=refused)


#: What is asked there, so that it is refused for another reason; of any other there is no change.
_REFUSED: Mapping[str, Mapping[str, Any]] = {
    "STREAM.MSG.GET": {"seq": NEVER},
    "STREAM.MSG.DELETE": {"seq": NEVER},
    "STREAM.CREATE": {"name": NOWHERE},
    "STREAM.UPDATE": {"name": NOWHERE},
    "CONSUMER.CREATE": {"stream_name": NOWHERE, "config": {}},
    "CONSUMER.MSG.NEXT": {"batch": 1, "expires": 10**9, "idle_heartbeat": 9 * 10**8},
}


def _harmless(subject: str) -> tuple[str, bytes, dict[str, str] | None]:
    """A request there that changes nothing: subject, body and headers."""
    if subject.startswith("$JS.ACK."):
        return subject.replace(">", f"1.{NEVER}.{NEVER}.0.0"), b"+WPI", None
    if not subject.startswith("$JS.API."):
        return subject, b"", ELSEWHERE
    operation = subject.removeprefix("$JS.API.")
    request = next((body for verb, body in _REFUSED.items() if operation.startswith(verb)), None)
    return subject, json.dumps(request).encode() if request else b"", None


# -- clock and disk --------------------------------------------------------------------------------


def _clock(answer: Any, before: float, after: float, version: str) -> Clock | Unknown:
    if isinstance(answer, Unknown):
        return answer
    if "ts" not in answer:
        return Unknown(f"nats-server {version} does not say what time it has (2.10 does)")
    head, _, rest = str(answer["ts"]).rstrip("Z").partition(".")
    moment = datetime.fromisoformat(f"{head}+00:00").astimezone(timezone.utc).timestamp()
    moment += float(f"0.{rest or 0}")
    return Clock(ahead=moment - (before + after) / 2, within=(after - before) / 2)


def syncs(monitor: str, timeout: float) -> dict[str, str]:
    """How often a server syncs to disk, by its monitoring port. Blocks.

    Args:
        monitor: as ``http://nats:8222``; several, with commas.
        timeout: seconds for each.

    Raises:
        Unknown: it was not asked, does not answer, or does not say.
    """
    if not monitor:
        raise Unknown(
            "a client cannot see it: give --monitor http://HOST:8222 (each server's monitoring "
            "port, with commas), or see /varz, jetstream.config.sync_interval; the default is 2 min"
        )
    return dict(_sync(url.strip().rstrip("/"), timeout) for url in monitor.split(","))


def _sync(url: str, timeout: float) -> tuple[str, str]:
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise Unknown(f"{url} is not the URL of a monitoring port, such as http://nats:8222")
    try:
        with urllib.request.urlopen(f"{url}/varz", timeout=timeout) as answer:
            found = json.load(answer)
    except (OSError, ValueError) as error:
        raise Unknown(f"{url}: {error}") from error
    made = (found.get("jetstream") or {}).get("config") or {}
    if "sync_interval" not in made and not made.get("sync_always"):
        raise Unknown(f"{url}: nats-server {found.get('version')} does not say it")
    name = found.get("server_name", url)
    return name, "always" if made.get("sync_always") else f"{made['sync_interval'] / 1e9:g} s"
