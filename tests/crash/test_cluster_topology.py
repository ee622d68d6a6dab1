"""Stream, consumer and publishing in a cluster of three that is not whole, or not yet there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_jetstream import JetStream
from celery_jetstream.exceptions import TopologyError
from celery_jetstream.outcomes import Verdict
from tests.clusters import NatsCluster
from tests.conftest import Names
from tests.servers import need, wait_until

pytestmark = pytest.mark.timeout(180)

MakeApp = Callable[..., JetStream]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[NatsCluster]:
    need("nats")
    with NatsCluster(tmp_path / "nats") as cluster:
        yield cluster


@pytest.fixture
def make_app(cluster: NatsCluster, names: Names) -> Iterator[MakeApp]:
    made: list[JetStream] = []

    def make(num_replicas: int = 3, **settings: Any) -> JetStream:
        app = Celery("test", broker="memory://", set_as_current=False)
        app.conf.update(
            jetstream_nats_urls=cluster.url,
            jetstream_stream_name=names.stream_name,
            jetstream_app_name=names.app_name,
            jetstream_destination_app=names.destination_app,
            jetstream_num_replicas=num_replicas,
            **settings,
        )
        made.append(JetStream(app))
        return made[-1]

    yield make
    for jetstream in made:
        jetstream.close()


def replicas(cluster: NatsCluster, names: Names) -> int:
    """How many servers have the stream, as its leader says, and are current."""
    leader = cluster.leader_of_stream(names.stream_name)
    group = cluster.streams(leader)[names.stream_name]["cluster"]
    return 1 + sum(peer["current"] for peer in group.get("replicas") or ())


def whole(cluster: NatsCluster, names: Names, messages: int) -> None:
    """All three have the stream, with so many messages."""
    wait_until(lambda: replicas(cluster, names) == 3, 30, "three replicas")
    wait_until(
        lambda: {count for count, _ in cluster.states(names.stream_name)} == {messages},
        30,
        f"{messages} messages on each",
    )


def test_provisioning_waits_for_a_cluster_that_is_starting(
    cluster: NatsCluster, make_app: MakeApp, names: Names
) -> None:
    """The first of three is up: there is no leader yet, and nobody answers."""
    cluster.stop()
    cluster.nodes[0].start()
    jetstream = make_app()
    others = threading.Timer(2, cluster.launch)
    others.start()
    try:
        plan = jetstream.provision()
    finally:
        others.join()
    assert [change.action for change in plan.changes] == ["create", "create"]
    assert jetstream.publish("user.created", {})
    whole(cluster, names, 1)


@pytest.mark.soak
def test_provisioning_while_a_server_is_down(
    cluster: NatsCluster, make_app: MakeApp, names: Names
) -> None:
    """Two of three are enough; the third gets its copy when it is back."""
    down = next(node for node in cluster.nodes if node is not cluster.meta_leader())
    down.kill()
    jetstream = make_app()
    jetstream.provision()
    assert jetstream.publish("user.created", {})
    down.start()
    cluster.wait_current()
    whole(cluster, names, 1)


@pytest.mark.soak
def test_provisioning_while_a_leader_is_elected(
    cluster: NatsCluster, make_app: MakeApp, names: Names
) -> None:
    first = make_app()
    first.provision()
    cluster.leader_of_stream(names.stream_name).kill()
    plan = make_app().provision()
    assert [change.action for change in plan.changes] == ["none", "none"]
    assert first.publish("user.created", {})


@pytest.mark.soak
def test_from_one_replica_to_three(cluster: NatsCluster, make_app: MakeApp, names: Names) -> None:
    """What is stored is copied; the consumer follows its stream."""
    one = make_app(num_replicas=1)
    one.provision()
    assert all(one.publish_batch([{"event_type": "user.created", "payload": {}}] * 100))
    assert replicas(cluster, names) == 1
    plan = make_app(num_replicas=3).provision()
    assert "num_replicas: 1 -> 3" in str(plan)
    whole(cluster, names, 100)
    cluster.leader_of_stream(names.stream_name).kill()
    assert one.publish("user.created", {})
    leader = cluster.leader_of_stream(names.stream_name)
    assert cluster.streams(leader)[names.stream_name]["state"]["messages"] == 101


def test_more_replicas_than_servers(make_app: MakeApp) -> None:
    with pytest.raises(TopologyError, match=r"more than .* servers .*\(error 10005\)"):
        make_app(num_replicas=5).provision()


def test_without_a_quorum_a_publish_is_an_outage_and_no_double(
    cluster: NatsCluster, make_app: MakeApp, names: Names
) -> None:
    """The leader left alone takes the event, and can neither store nor forget it."""
    jetstream = make_app()
    jetstream.provision()
    leader = cluster.leader_of_stream(names.stream_name)
    for node in cluster.nodes:
        if node is not leader:
            node.kill()
    results = [jetstream.publish("user.created", {}, event_id="e1", timeout=1) for _ in range(3)]
    assert {result.verdict for result in results} <= {Verdict.OUTAGE, Verdict.NO_STREAM}
    cluster.start()
    assert jetstream.publish("user.created", {}, event_id="e1")
    whole(cluster, names, 1)
