"""Three nats-servers that are one cluster, each a private process on loopback ports.

As ``NatsServer``, of which each node is one: it can be killed, paused and started again with its
store, and all end with the ``with`` block, by their own process ids. What the cluster is doing is
asked of the nodes' monitoring ports, which no client's connection has a part in.
"""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from celery_jetstream.testing import NatsServer, ServerError, free_port, wait_until

__all__ = ("NatsCluster", "Node")

#: Seconds that a node may take to answer on its monitoring port; one that is paused never does.
_PATIENCE = 2.0
#: Seconds between two looks at the cluster: each costs it something.
_LOOK = 0.1


class Node(NatsServer):
    """One server of a cluster: ``kill()``, ``pause()``, ``resume()``, ``restart()``."""

    def __init__(self, directory: Path, name: str, routes: list[int], number: int) -> None:
        self.server_name = name
        self.monitor = free_port()
        listed = ", ".join(f"nats://127.0.0.1:{port}" for port in routes)
        config = (
            f"server_name: {name}\n"
            f"http: 127.0.0.1:{self.monitor}\n"
            f"cluster {{ name: test, listen: 127.0.0.1:{routes[number]}, routes: [{listed}] }}\n"
        )
        super().__init__(directory, port=free_port(), config=config)

    def __str__(self) -> str:
        return self.server_name

    def ask(self, path: str) -> dict[str, Any]:
        """What its monitoring port says; empty where it does not answer."""
        url = f"http://127.0.0.1:{self.monitor}/{path}"
        try:
            with urllib.request.urlopen(url, timeout=_PATIENCE) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:  # healthz says so with 503
            with error:
                found = json.load(error)
        except (OSError, ValueError):
            return {}
        return found

    @property
    def answers(self) -> bool:
        """Whether it is running and not paused."""
        return self.running and not self._paused


class NatsCluster:
    """``size`` nodes with JetStream, which find each other on 127.0.0.1 only.

    Args:
        directory: for the nodes' stores; kept over ``kill()``, ``stop()`` and ``start()``.
        size: how many nodes.
    """

    def __init__(self, directory: Path, size: int = 3) -> None:
        routes = [free_port() for _ in range(size)]
        self.nodes = [
            Node(directory / f"n{number}", f"n{number}", routes, number) for number in range(size)
        ]

    @property
    def urls(self) -> list[str]:
        """The URL of each node."""
        return [node.url for node in self.nodes]

    @property
    def url(self) -> str:
        """All of them, as ``jetstream_nats_urls`` takes them."""
        return ",".join(self.urls)

    def start(self, timeout: float = 30) -> NatsCluster:
        """Starts what does not run; returns when there is a leader of all and all are current."""
        self.launch()
        self.wait_current(timeout)
        return self

    def launch(self) -> None:
        """Starts what does not run, and does not wait for a leader."""
        for node in self.nodes:
            node.start()

    def stop(self) -> None:
        """Ends every node, whatever goes wrong with one of them."""
        with contextlib.ExitStack() as stack:
            for node in self.nodes:
                stack.callback(node.stop)
            for node in self.nodes:
                stack.callback(node.kill)  # first: one by one they would elect leaders

    def rolling_restart(self, timeout: float = 60) -> None:
        """SIGTERM to each in turn; the next when it is back and all are current."""
        for node in self.nodes:
            node.restart(timeout=20)
            self.wait_current(timeout)

    # -- who leads ---------------------------------------------------------------------------------

    def leader_of_stream(self, name: str, timeout: float = 30) -> Node:
        """The node that leads a stream, as soon as there is one."""
        return self._leader(lambda stream: stream["cluster"], name, timeout, f"stream {name}")

    def leader_of_consumer(self, stream: str, durable: str, timeout: float = 30) -> Node:
        """The node that leads a consumer, as soon as there is one."""

        def group(found: dict[str, Any]) -> dict[str, Any]:
            for consumer in found.get("consumer_detail") or ():
                if consumer["name"] == durable:
                    return dict(consumer["cluster"])
            return {}

        return self._leader(group, stream, timeout, f"consumer {durable} of {stream}")

    def meta_leader(self, timeout: float = 30) -> Node:
        """The node that leads the cluster, as soon as there is one."""

        def look() -> Node | None:
            found = {n.ask("jsz").get("meta_cluster", {}).get("leader") for n in self._up()}
            return self._one(found)

        return _wait(look, timeout, "a leader of the cluster")

    def node_of(self, pid: int, timeout: float = 30) -> Node:
        """The node that a process of ours is connected to: its pid ends its client's name."""

        def look() -> Node | None:
            for node in self._up():
                for connection in node.ask("connz?limit=1000").get("connections") or ():
                    if connection.get("name", "").endswith(f" {pid}"):
                        return node
            return None

        return _wait(look, timeout, f"a connection of process {pid}")

    def streams(self, node: Node) -> dict[str, dict[str, Any]]:
        """Every stream as a node sees it, by name: ``state``, ``cluster``, ``consumer_detail``."""
        answer = node.ask("jsz?accounts=1&streams=1&consumers=1&config=1")
        details = answer.get("account_details") or ()
        return {s["name"]: s for account in details for s in account.get("stream_detail") or ()}

    # -- whether all is well -----------------------------------------------------------------------

    def wait_current(self, timeout: float = 60) -> None:
        """Waits until every node is healthy: it has caught up with all streams and consumers."""
        _wait(lambda: not self.trouble(), timeout, "all nodes to be current", self.trouble)

    def trouble(self) -> list[str]:
        """What is not as it should be, by node."""
        found = []
        for node in self.nodes:
            meta = node.ask("jsz").get("meta_cluster", {}) if node.answers else {}
            if not meta.get("leader") or meta.get("cluster_size") != len(self.nodes):
                found.append(f"{node}: {meta or 'no answer'}")
            elif (health := node.ask("healthz")).get("status") != "ok":
                found.append(f"{node}: {health}")
        return found

    def states(self, stream: str) -> list[tuple[int, int]]:
        """Of each replica: its messages and its last sequence."""
        found = [self.streams(node).get(stream, {}).get("state", {}) for node in self.nodes]
        return [(state.get("messages", -1), state.get("last_seq", -1)) for state in found]

    def __enter__(self) -> NatsCluster:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    # -- how ---------------------------------------------------------------------------------------

    def _up(self) -> list[Node]:
        return [node for node in self.nodes if node.answers]

    def _one(self, names: set[Any]) -> Node | None:
        """The node of that name, where all are of one mind."""
        for node in self._up():
            if names == {node.server_name}:
                return node
        return None

    def _leader(self, group: Any, stream: str, timeout: float, what: str) -> Node:
        def look() -> Node | None:
            there = [self.streams(node).get(stream) for node in self._up()]
            return self._one({group(found).get("leader") for found in there if found})

        return _wait(look, timeout, f"a leader of {what}")


def _wait(look: Any, timeout: float, what: str, explain: Any = None) -> Any:
    try:
        return wait_until(look, timeout, what, every=_LOOK)
    except TimeoutError as error:
        raise ServerError(f"{error}{f'; {explain()}' if explain else ''}") from None
