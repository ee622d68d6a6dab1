"""How each fault is done, and undone: a generator of what to wait for in between."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator

import redis

from tests.crash.chaos.chain import Chain
from tests.crash.chaos.schedule import Fault, Volley
from tests.crash.chaos.services import Service, children
from tests.crash.faults import until

__all__ = ("Injector",)

#: Seconds in which a process is to pass an armed point.
PASSES = 8.0
#: Seconds until a process is to be there, which may just have ended.
THERE = 15.0

#: What to wait for: so many seconds, or a condition for so many.
Wait = tuple[float, Callable[[], bool]]
Steps = Generator[Wait, None, bool]


class Injector:
    """Breaks a chain.

    Attributes:
        injected: how often each fault was, by its name; one that met nobody is not counted.
        wrong: what did not end in time.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.injected: Counter[str] = Counter()
        self.wrong: list[str] = []

    def fire(self, volley: Volley) -> list[Fault]:
        """Does a volley, and undoes it; returns the faults that met somebody."""
        met: list[Fault] = []
        begun = time.monotonic()
        running = [_Running(self._delayed(fault, met), begun) for fault in volley.faults]
        most = 90.0
        until(lambda: (self.chain.look(), not _step(running))[1], most, f"the end of {volley}")
        self.injected.update(fault.name for fault in met)
        return met

    def _delayed(self, fault: Fault, met: list[Fault]) -> Steps:
        yield fault.after, _never
        if (yield from self._do(fault)):
            met.append(fault)
            return True
        return False

    def _do(self, fault: Fault) -> Steps:
        name, _, at = fault.how.partition(" ")
        if at:
            return (yield from self._at_point(fault, parent="parent" in at))
        if fault.what in self.chain.servers.by_name:
            return (yield from self._break_server(fault))
        if "child" in fault.what and "with" not in fault.what:
            return (yield from self._break_child(fault, signal.Signals[name]))
        return (yield from self._break_service(fault, signal.Signals[name]))

    # -- processes -------------------------------------------------------------------------------

    def _there(self, fault: Fault) -> Generator[Wait, None, Service]:
        """A service that runs; waited for."""
        services = self.chain.of(fault.what.split()[0].removesuffix("'s"))
        service = services[int(fault.which * len(services)) % len(services)]
        yield THERE, lambda: service.is_ready
        return service

    def _break_service(self, fault: Fault, number: signal.Signals) -> Steps:
        service: Service = yield from self._there(fault)
        group, process, signals = "with children" in fault.what, service.process, service.signals
        if not service.send(number, group=group):
            return False
        if number == signal.SIGSTOP:
            yield fault.lasts, _never
            signals.append(signal.SIGCONT)
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(process.pid, signal.SIGCONT)
        elif number in (signal.SIGTERM, signal.SIGQUIT):
            yield fault.lasts, lambda: process.poll() is not None
            if process.poll() is None:
                if fault.lasts >= 45:
                    self.wrong.append(f"{fault.name}: it did not end in {fault.lasts:g} s")
                signals.append(signal.SIGKILL)
                process.kill()
        return True

    def _break_child(self, fault: Fault, number: signal.Signals) -> Steps:
        kind = "flusher" if fault.what.startswith("flusher") else "worker"
        service: Service = yield from self._there(Fault(fault.how, kind, which=fault.which))
        found = children(service.pid) if service.running else []
        if not found:
            return False
        child = found[int(fault.which * 97) % len(found)]
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)
        if number == signal.SIGSTOP:
            yield fault.lasts, _never
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGCONT)
        return True

    def _at_point(self, fault: Fault, *, parent: bool) -> Steps:
        armed = self.chain.points / fault.what
        plan = {"signal": signal.SIGKILL, "parent": parent}
        if fault.what == "outbox-sending":
            plan["later"] = fault.which / 50
        with contextlib.suppress(FileNotFoundError):
            _write_at_once(armed, plan)
        yield PASSES, lambda: not armed.exists()
        try:
            armed.unlink()
        except FileNotFoundError:
            self._note_killed(armed.name, parent)
            return True
        return False

    def _note_killed(self, point: str, parent: bool) -> None:
        """A main process that was killed there was sent a signal."""
        for taken in self.chain.points.glob(f"{point}.*"):
            pid = int(taken.name.split(".")[2 if parent else 1])
            for service in self.chain.services:
                service.heard(pid, signal.SIGKILL)
            taken.unlink()

    # -- servers ---------------------------------------------------------------------------------

    def _break_server(self, fault: Fault) -> Steps:
        server = self.chain.servers.by_name[fault.what]
        if not server.running:
            return False
        if fault.how == "FLUSHALL":
            with contextlib.suppress(redis.RedisError):
                with redis.Redis.from_url(self.chain.servers.redis.url, socket_timeout=2) as client:
                    client.flushall()
                return True
            return False
        if fault.how == "SIGSTOP":
            server.pause()
            yield fault.lasts, _never
            if server.running and server._paused:
                server.resume()
        elif fault.how == "SIGKILL":
            server.kill()
            yield fault.lasts, _never
            server.start()
        else:
            server.restart()
        return True


class _Running:
    """A fault that goes on: until when it waits, and for what."""

    def __init__(self, steps: Steps, now: float) -> None:
        self._steps = steps
        self._until, self._condition = now, _never

    def step(self) -> bool:
        """Whether it goes on."""
        while time.monotonic() >= self._until or self._condition():
            try:
                seconds, self._condition = next(self._steps)
            except StopIteration:
                return False
            self._until = time.monotonic() + seconds
        return True


def _step(running: list[_Running]) -> bool:
    running[:] = [one for one in running if one.step()]
    return bool(running)


def _never() -> bool:
    return False


def _write_at_once(armed: os.PathLike[str], plan: dict[str, object]) -> None:
    draft = f"{os.fspath(armed)}~"
    with open(draft, "w") as file:
        json.dump(plan, file)
    os.rename(draft, armed)
