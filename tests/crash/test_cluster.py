"""A cluster of three, one of which is killed, frozen or restarted under load.

Publishing and consuming go on all the while. After each fault: what was acked is not lost, no
effect doubled, nothing dead, nothing left. Each fault prints its line of the table (``-s``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import text

from celery_jetstream import JetStream
from celery_jetstream.outcomes import PublishResult
from tests.banking import Bank
from tests.clusters import NatsCluster, Node
from tests.conftest import Names
from tests.crash import faults
from tests.crash.traffic import Traffic
from tests.servers import PostgresServer, RedisServer, need, wait_until
from tests.stack import in_both_modes_soak

pytestmark = pytest.mark.timeout(300)

#: Seconds that a node is away: longer than an election.
AWAY = 7.0

Find = Callable[["Side"], Node]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[NatsCluster]:
    need("nats")
    with NatsCluster(tmp_path / "nats") as cluster:
        yield cluster


class Side:
    """What the tests ask for: the cluster, the bank in it, and the process that consumes."""

    def __init__(self, cluster: NatsCluster, bank: Bank) -> None:
        self.cluster, self.bank = cluster, bank
        self.publishing = os.getpid()
        bank.start()
        ready = "ready." if bank.direct else "bridge is ready"
        (self.consuming,) = [p.pid for p in bank.processes if ready in p.text()]

    def stream_leader(self) -> Node:
        return self.cluster.leader_of_stream(self.bank.names.stream_name)

    def consumer_leader(self) -> Node:
        stream, app = self.bank.names.stream_name, self.bank.names.app_name
        return self.cluster.leader_of_consumer(stream, f"{app}-workers")

    def publishers_node(self) -> Node:
        return self.cluster.node_of(self.publishing)

    def consumers_node(self) -> Node:
        return self.cluster.node_of(self.consuming)

    def agree(self) -> None:
        """All three have the same stream, and nothing is in it."""
        stream = self.bank.names.stream_name
        wait_until(lambda: len(set(self.cluster.states(stream))) == 1, 30, "replicas that agree")
        assert self.cluster.states(stream)[0][0] == 0
        assert len(self.cluster.streams(self.stream_leader())[stream]["cluster"]["replicas"]) == 2


@pytest.fixture
def make_side(
    tmp_path: Path,
    cluster: NatsCluster,
    redis_server: RedisServer,
    postgres_server: PostgresServer,
    names: Names,
) -> Iterator[Callable[..., Side]]:
    made: list[Bank] = []

    def make(**settings: Any) -> Side:
        user = f"bank_{os.getpid()}_{names.app_name.replace('-', '_')}"
        postgres_server.create_user(user)
        settings = {**faults.SETTINGS, "jetstream_num_replicas": 3, **settings}
        url = postgres_server.url("postgres", user)
        bank = Bank(tmp_path, cluster.url, redis_server.url, names, url, **settings)
        made.append(bank)
        return Side(cluster, bank)

    yield make
    for bank in made:
        bank.close()


# -- faults under load -----------------------------------------------------------------------------

#: Whose node is hit; of a short run only the first.
TARGETS: dict[str, Find] = {
    "the stream's leader": Side.stream_leader,
    "the consumer's leader": Side.consumer_leader,
    "the publisher's node": Side.publishers_node,
    "the consuming process's node": Side.consumers_node,
}


def killed(cluster: NatsCluster, node: Node) -> None:
    node.kill()
    faults.let_pass(AWAY)
    node.start()
    cluster.wait_current()


def frozen(cluster: NatsCluster, node: Node) -> None:
    node.pause()
    faults.let_pass(AWAY)
    node.resume()
    cluster.wait_current()


@in_both_modes_soak
@pytest.mark.parametrize("hit", [killed, pytest.param(frozen, marks=pytest.mark.soak)])
def test_one_of_three(
    make_side: Callable[..., Side],
    hit: Callable[[NatsCluster, Node], None],
    rounds: int,
    direct: bool,
) -> None:
    """``kill -9`` and SIGSTOP; every fourth round, for each takes an election."""
    side = make_side(direct=direct)
    mode = "direct" if direct else "bridge"
    with Traffic(side.bank, side.bank.hub.publish_batch) as traffic:
        for number in range(-(-rounds // 4)):
            for target, find in list(TARGETS.items())[: 1 if rounds == 1 else None]:
                what = f"{mode}, round {number}: {hit.__name__}: {target}"
                traffic.under(what, lambda find=find: hit(side.cluster, find(side)))
    traffic.right(f"{mode}, {hit.__name__}")
    side.agree()


@pytest.mark.soak
def test_one_of_three_and_an_outbox(make_side: Callable[..., Side], rounds: int) -> None:
    """What was committed arrives, whoever was killed; the flusher is a process of its own."""
    side = make_side()
    bank, given = side.bank, side.bank.hub.config
    settings = {
        "jetstream_nats_urls": given.nats_urls,
        "jetstream_stream_name": given.stream_name,
        "jetstream_app_name": given.app_name,
        "jetstream_destination_app": given.destination_app,
        "jetstream_num_replicas": given.num_replicas,
        "jetstream_database_url": bank.database_url,
        "jetstream_outbox_nudge": False,
    }
    conf, ledger = json.dumps(settings), str(bank.directory / "shop")
    command = ("jetstream", "outbox", "relay", "--interval", "0.05")
    relay = bank.celery(*command, app="tests.apps.shop", SHOP_CONF=conf, SHOP_LEDGER=ledger)
    side.publishing = relay.pid
    app = Celery("writer", broker="memory://", set_as_current=False)
    app.conf.update(settings)
    writer = JetStream(app)
    outbox = writer.outbox

    def commit(events: Sequence[dict[str, Any]]) -> list[PublishResult]:
        with outbox.database.engine.begin() as connection:
            event_ids = outbox.add_many(connection, events)
        return [PublishResult(True, event_id, "", queued=True) for event_id in event_ids]

    with Traffic(bank, commit) as traffic:
        for number in range(-(-rounds // 4)):
            for target, find in TARGETS.items():
                what = f"outbox, round {number}: killed: {target}"
                traffic.under(what, lambda find=find: killed(side.cluster, find(side)))
    traffic.right("outbox, killed")
    side.agree()
    assert relay.stop(30) == 0
    with outbox.database.engine.connect() as connection:
        rows = connection.execute(
            text("SELECT status, count(*) FROM jetstream_outbox GROUP BY status")
        )
        assert [tuple(row) for row in rows] == [("sent", len(traffic.acked))]
    writer.close()


def restarted(cluster: NatsCluster) -> None:
    cluster.rolling_restart()


def all_killed(cluster: NatsCluster) -> None:
    for node in cluster.nodes:
        node.kill()
    cluster.start()


@pytest.mark.soak
@pytest.mark.parametrize("direct", [False, True], ids=["bridge", "direct"])
def test_all_three(make_side: Callable[..., Side], rounds: int, direct: bool) -> None:
    """SIGTERM to one after the other; ``kill -9`` to all at once."""
    side = make_side(direct=direct)
    mode = "direct" if direct else "bridge"
    with Traffic(side.bank, side.bank.hub.publish_batch) as traffic:
        for number in range(-(-rounds // 4)):
            for hit in (restarted, all_killed):
                what = f"{mode}, round {number}: {hit.__name__}"
                traffic.under(what, lambda hit=hit: hit(side.cluster))
    traffic.right(f"{mode}, all three")
    side.agree()
