"""Every fault of ``test_kills.py`` in random order, two at a time, for ``--rounds`` rounds.

The order comes from a seed that is printed; ``CRASH_SEED=…`` repeats it (what the processes do
meanwhile is not repeated).
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from celery_jetstream.testing import NatsServer
from tests.crash import faults
from tests.servers import RedisServer, need
from tests.stack import WORKER, CeleryProcess, Stack

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]


@pytest.fixture
def servers() -> Iterator[tuple[NatsServer, RedisServer]]:
    need("nats")
    need("redis")
    with NatsServer() as nats, RedisServer() as redis:
        yield nats, redis


class Chaos:
    """The processes of one desk, and the ways to break them. Each way leaves all running."""

    def __init__(self, stack: Stack, nats: NatsServer, redis: RedisServer) -> None:
        self.stack, self.nats, self.redis = stack, nats, redis
        self._started = 0
        self.bridges = [faults.Manager(self._bridge) for _ in range(2)]
        self.workers = [faults.Manager(self._worker) for _ in range(2)]

    def _bridge(self) -> CeleryProcess:
        return self.stack.celery("jetstream", "bridge")

    def _worker(self) -> CeleryProcess:
        self._started += 1
        return self.stack.celery(*WORKER, "-c", "2", "-n", f"w{self._started}@%h")

    def look(self) -> None:
        """What a process manager does."""
        for manager in (*self.bridges, *self.workers):
            manager.look()

    def ways(self) -> dict[str, Callable[[random.Random], None]]:
        return {
            "kill a pool child": lambda dice: self.kill_child(),
            "kill a worker": lambda dice: dice.choice(self.workers).process.kill(),
            "SIGTERM a worker": lambda dice: self.end(dice.choice(self.workers), signal.SIGTERM),
            "SIGQUIT a worker": lambda dice: self.end(dice.choice(self.workers), signal.SIGQUIT),
            "kill a bridge": lambda dice: dice.choice(self.bridges).process.kill(),
            "SIGTERM a bridge": lambda dice: self.end(dice.choice(self.bridges), signal.SIGTERM),
            "kill nats-server": lambda dice: (self.nats.kill(), self.nats.start())[0],
            "freeze nats-server": self.freeze,
            "FLUSHALL": lambda dice: print("  lost copies:", faults.flush(self.stack)),
            "kill Redis": lambda dice: (self.redis.kill(), self.redis.start())[0],
        }

    def kill_child(self) -> None:
        running = faults.running(self.stack, "slow.load")
        if running:
            try:
                os.kill(running[-1]["pid"], signal.SIGKILL)
            except ProcessLookupError:
                print("  it was gone")

    def end(self, manager: faults.Manager, number: signal.Signals) -> None:
        """Not waited for: the next fault may come while it ends."""
        manager.process.send(number)

    def freeze(self, dice: random.Random) -> None:
        self.nats.pause()
        faults.let_pass(dice.uniform(0.5, 6), self.look)
        self.nats.resume()


def test_soak(make_stack: Any, servers: tuple[NatsServer, RedisServer], rounds: int) -> None:
    seed = int(os.environ.get("CRASH_SEED") or random.SystemRandom().randrange(10**6))
    print(f"\nCRASH_SEED={seed}")
    dice = random.Random(seed)
    nats, redis = servers
    stack: Stack = make_stack(nats_url=nats.url, broker=redis.url, **faults.SETTINGS)
    chaos = Chaos(stack, nats, redis)
    ways = chaos.ways()
    events: list[str] = []
    for number in range(rounds):
        new = faults.publish_load(stack, dice.randrange(200, 800))
        events += new
        chosen = [dice.choice(list(ways)) for _ in range(2)]
        print(f"round {number}: {', then '.join(chosen)}")
        for way in chosen:
            faults.in_the_middle(stack, dice.randrange(20, 60), meanwhile=chaos.look)
            ways[way](dice)
        faults.nothing_lost(
            stack, new, f"seed {seed}, round {number}: {chosen}", meanwhile=chaos.look
        )
    doubles = faults.nothing_lost(stack, events, f"seed {seed}", meanwhile=chaos.look)
    print(f"{rounds} rounds, {len(events)} events, {doubles} doubles")
