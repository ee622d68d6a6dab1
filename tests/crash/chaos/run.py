"""One run of chaos: volley after volley, then quiet, then the account."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.crash.chaos import account
from tests.crash.chaos.account import Found
from tests.crash.chaos.chain import Chain, running_chain
from tests.crash.chaos.evidence import Evidence
from tests.crash.chaos.injector import Injector
from tests.crash.chaos.schedule import Fault, Volley, plan
from tests.crash.faults import let_pass, until
from tests.servers import wait_until

__all__ = ("Firing", "Result", "run")

#: Seconds in which effects must come again after a volley is over, and at the end in which less
#: must be left to do than ever before, until nothing is: a slow machine has its time.
FLOW, QUIET = 90.0, 75.0
#: So many events may wait to be handled; then the writers wait.
BEHIND = 500
#: So many more effects mean that they do.
FLOWING = 15
#: Seconds that what a run started may take to be gone.
GONE = 15.0


@dataclass
class Firing:
    """A volley that was fired: seconds since 1970, and the faults that met somebody."""

    begun: float
    over: float
    flowing: float
    met: list[Fault]


@dataclass
class Result:
    """What one run has shown."""

    mode: str
    seed: int
    volleys: int
    seconds: float = 0.0
    quiet_after: float = 0.0
    firings: list[Firing] = field(default_factory=list)
    written: list[tuple[str, float]] = field(default_factory=list)
    effects: list[tuple[str, float]] = field(default_factory=list)
    found: Found = field(default_factory=Found)
    violations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def replay(self) -> str:
        """The command that repeats it."""
        return (
            f"make crash ROUNDS=1 ARGS=\"-s -k 'test_chaos and {self.mode}' "
            f'--seed={self.seed} --volleys={self.volleys}"'
        )


def run(directory: Path, seed: int, *, direct: bool, volleys: int, say: Any = print) -> Result:
    """Runs a seed's plan against a chain of its own.

    An odd seed's has two bridges, and that of each third is in push mode.
    """
    result = Result("direct" if direct else "bridge", seed, volleys)
    say(f"\nchaos: {result.replay}")
    options = {"bridges": 1 + seed % 2, "push": seed % 3 == 0 and not direct}
    with running_chain(directory, direct=direct, **options) as chain:
        _Run(chain, result, say).go(plan(seed, direct, volleys))
    return result


class _Run:
    def __init__(self, chain: Chain, result: Result, say: Any) -> None:
        self._chain = chain
        self._evidence = Evidence(chain)
        self._result = result
        self._say = say
        self._injector = Injector(chain)
        self._begun = time.monotonic()

    def go(self, volleys: list[Volley]) -> None:
        self._chain.start_all()
        if self._flows("the start"):
            for number, volley in enumerate(volleys):
                self._say(f"{self._clock} volley {number}: {volley}")
                if not self._fire(volley):
                    break
        self._end()

    @property
    def _clock(self) -> str:
        return f"{time.monotonic() - self._begun:6.1f} s"

    def _fire(self, volley: Volley) -> bool:
        let_pass(volley.pause, self._chain.look)
        begun = time.time()
        met = self._injector.fire(volley)
        over = time.time()
        missed = [fault for fault in volley.faults if fault not in met]
        self._result.notes += [f"{fault.name} met nobody" for fault in missed]
        flows = self._flows(str(volley))
        self._result.firings.append(Firing(begun, over, time.time(), met))
        return flows

    def _flows(self, after: str) -> bool:
        """Whether all runs, and effects come again."""
        start, looked = -1, 0.0

        def flowing() -> bool:
            nonlocal start, looked
            self._chain.look()
            if time.monotonic() - looked > 1:
                looked = time.monotonic()
                self._chain.hold(self._evidence.behind() > BEHIND)
            now = self._evidence.effects_so_far()
            start = now if start < 0 else start
            return now >= start + FLOWING and self._chain.all_ready()

        try:
            until(flowing, FLOW, "effects")
        except TimeoutError:
            ready = {f"{s.name} {s.pid}": s.is_ready for s in self._chain.services}
            self._violation(f"no effect in {FLOW:g} s after {after}; ready: {ready}")
            return False
        return True

    # -- the end ---------------------------------------------------------------------------------

    def _end(self) -> None:
        chain, result = self._chain, self._result
        chain.servers.heal()
        result.violations += chain.stop("writer")
        start = time.monotonic()
        result.found = self._wait_quiet()
        result.quiet_after = time.monotonic() - start
        self._say(f"{self._clock} quiet")
        result.written, result.effects = (
            self._evidence.moments("orders"),
            self._evidence.moments("effects"),
        )
        result.violations += account.violations(result.found)
        result.violations += chain.stop("bridge", "worker", "flusher", "beat")
        result.violations += self._injector.wrong
        self._judge_ends()
        self._judge_leftovers()
        result.seconds = time.monotonic() - self._begun
        self._say(f"{self._clock} {self.summary()}")

    def _wait_quiet(self) -> Found:
        """Until nothing is left to be done; what there is, then or at the deadline."""
        found, least, since, said = Found(), sys.maxsize, time.monotonic(), time.monotonic()

        def over() -> bool:
            nonlocal found, least, since, said
            self._chain.look()
            now, asked = time.monotonic(), self._evidence.found()
            found = asked or found
            left = sum(account.going_on(found).values()) if asked else sys.maxsize
            if left < least:
                least, since = left, now
            if now - said > 5:
                said = now
                self._say(f"{self._clock} not quiet yet: {', '.join(account.unquiet(found))}")
            return left == 0 or now - since > QUIET

        until(over, 3600, "quiet")
        if least:
            self._violation(f"not quiet: nothing more was done in {QUIET:g} s")
        return found

    def _judge_ends(self) -> None:
        for service in self._chain.services:
            for end in service.ends:
                if end.wrong:
                    self._violation(f"{end.service}: {end.wrong}; {end.log.name}")
                elif end.celerys_own:
                    self._result.notes.append(f"{end.service} ended by Celery's own defect")
                elif not end.signals:
                    self._result.notes.append(f"{end.service} gave up with {end.status} at start")
        for process in self._chain._processes:
            words = [words for words in BAD_WORDS if words in process.text()]
            if words:
                self._violation(f"{process.log.name} says {words[0]!r}")

    def _judge_leftovers(self) -> None:
        try:
            wait_until(lambda: not self._chain.left_running(), GONE, "the processes to be gone")
        except TimeoutError:
            for process in self._chain.left_running():
                self._violation(f"left running: {process}")

    def _violation(self, text: str) -> None:
        self._say(f"{self._clock} VIOLATION {text}")
        self._result.violations.append(text)

    def summary(self) -> str:
        found, result = self._result.found, self._result
        return (
            f"{result.mode}, seed {result.seed}: {sum(self._injector.injected.values())} faults, "
            f"{len(found.orders)} events, {found.effects.total()} effects, {len(found.dead)} dead "
            f"letters, lost {len(found.lost)}, doubled {len(found.doubled)}, stuck "
            f"{len(found.stuck)}; quiet after {result.quiet_after:.1f} s"
        )


#: In no log, whatever is broken.
BAD_WORDS = (
    "this is a defect of ours",
    "Fatal Python error",
    "was never retrieved",
    "failed; another follows",
)
