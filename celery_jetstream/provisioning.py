"""Provisioning: the stream and the consumers of an app, and of its peers where that is wanted.

Receives the settings and a way to a session; asks the server what is there
(:mod:`~celery_jetstream.consumers` decides who shares a consumer) and has
:mod:`~celery_jetstream.topology` make the rest.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from . import specs, topology
from .capabilities import has_filter_subjects
from .config import Config
from .connection import Connection
from .consumers import consumer_specs, peer_spec, possible_specs, stream_spec
from .exceptions import NoResponders
from .permissions import Role, admin, operator, run_time
from .plans import Plan
from .session import Session
from .specs import ConsumerSpec
from .subjects import covered

__all__ = ("Provisioner", "peers", "provision", "roles")


class Provisioner:
    """Looks, and makes; everything here runs in the connection's loop thread.

    Args:
        config: the settings.
        session: awaited for the live session.
    """

    def __init__(self, config: Config, session: Callable[[], Awaitable[Session]]) -> None:
        self._config = config
        self._session = session

    async def api(self, operation: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """One request to ``$JS.API``, as :data:`.topology.Api` says."""
        session = await self._session()
        payload = json.dumps(request).encode() if request else b""
        try:
            answer = await session.ask(f"$JS.API.{operation}", payload)
        except NoResponders:
            return {"error": {"code": 503}}
        result: dict[str, Any] = json.loads(answer.data)
        return result

    async def consumers(self) -> tuple[ConsumerSpec, ...]:
        """The consumers that bring the app's events; where there are several sources, it asks.

        Raises:
            NotConnectedError: the server is not there to be asked.
        """
        first, *others = each = consumer_specs(self._config)
        if not others:
            return each
        found = await self._filters(first.durable)
        return consumer_specs(self._config, can_share=await self._can_share(), found=found)

    async def possible_consumers(self) -> tuple[ConsumerSpec, ...]:
        """The same without a question to JetStream: by the settings and the server's version."""
        if len(self._config.sources) == 1:
            return consumer_specs(self._config)
        return possible_specs(self._config, can_share=await self._can_share())

    async def ensure(
        self, consumers: tuple[ConsumerSpec, ...] | None = None, *, pair: bool = False
    ) -> Plan:
        """Brings the stream and the consumers to what is wanted; see :func:`.topology.ensure`."""
        return await topology.ensure(self.api, *await self._wanted(consumers, pair))

    async def plan(
        self, consumers: tuple[ConsumerSpec, ...] | None = None, *, pair: bool = False
    ) -> Plan:
        """Says what that would change, and changes nothing."""
        return await topology.plan(self.api, *await self._wanted(consumers, pair))

    async def _wanted(
        self, consumers: tuple[ConsumerSpec, ...] | None, pair: bool
    ) -> tuple[Any, ...]:
        wanted = await self.consumers() if consumers is None else consumers
        theirs = [await self._peers(peer) for peer in peers(self._config)] if pair else []
        return stream_spec(self._config), *wanted, *theirs

    async def _peers(self, peer: Config) -> ConsumerSpec:
        """The one that brings our events to a peer: its first, unless that takes others' only."""
        first = peer_spec(peer)
        found = await self._filters(first.durable)
        apart = found is not None and not all(covered(s, found) for s in first.filter_subjects)
        return peer_spec(peer, apart=apart)

    async def _can_share(self) -> bool:
        return has_filter_subjects((await self._session()).server_version)

    async def _filters(self, durable: str) -> list[str] | None:
        answer = await self.api(f"CONSUMER.INFO.{self._config.stream_name}.{durable}", {})
        return specs.filters(answer["config"]) if "config" in answer else None


def provision(
    config: Config,
    connection: Connection,
    *,
    dry_run: bool,
    pair: bool,
    found: Callable[[], Awaitable[tuple[ConsumerSpec, ...]]] | None = None,
) -> Plan:
    """Connects and provisions, or (``dry_run``) says what that would do. Any thread.

    Args:
        config: the settings.
        connection: where to.
        dry_run: change nothing.
        pair: the peers' consumers too.
        found: awaited for the app's consumers, by who has found them already.

    Raises:
        TopologyError: it cannot be had.
        NotConnectedError: no server, or (``PermissionDeniedError``) the user may not.
    """
    connection.connect()
    provisioner = Provisioner(config, connection.session)

    async def run() -> Plan:
        consumers = await found() if found else None
        return await (provisioner.plan if dry_run else provisioner.ensure)(consumers, pair=pair)

    return connection.run(run)


def peers(config: Config) -> list[Config]:
    """The settings of the apps at the other end, as far as ours tell: all else is the default."""
    others = dict.fromkeys((config.destination_app, *(one.name for one in config.sources)))
    own: dict[str, Any] = {
        "destination_app": config.app_name,
        "sources": (),
        "consumer_mode": "pull",
        "delivery_subject": None,
        "direct": False,
    }
    return [dataclasses.replace(config, app_name=other, **own) for other in others]


def roles(
    config: Config, *, pair: bool = False, inbox: str | None = None, status: bool = False
) -> tuple[Role, ...]:
    """The NATS users of an app: its own, the admin's and the operator's. Asks no server.

    Where several sources may share a consumer or not, which only a server can tell, both go.

    Args:
        config: the settings.
        pair: the admin provisions both ends, and the peers' users are named as well.
        inbox: the admin's inbox prefix; None for the app's.
        status: the app's own may also ask what health tells of JetStream.
    """
    ours = _all_specs(config)
    others = peers(config) if pair else []
    theirs = [spec for one in others for spec in (peer_spec(one), peer_spec(one, apart=True))]
    admins = admin([config, *others], [*ours, *theirs], inbox)
    return run_time(config, ours, status=status), admins, operator(config, ours)


def _all_specs(config: Config) -> tuple[ConsumerSpec, ...]:
    both = (*possible_specs(config, can_share=True), *possible_specs(config, can_share=False))
    return tuple({(one.durable, one.filter_subjects): one for one in both}.values())
