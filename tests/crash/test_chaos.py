"""Whatever is killed, stopped or ended, and however many at once: nothing is lost or doubled.

``tests/crash/chaos`` says what is run, what is broken, and what must hold. Prints its seed;
``--seed`` repeats one, ``--volleys`` makes a run longer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.chaos.report import PROPERTY, account_of
from tests.crash.chaos.run import run
from tests.servers import need
from tests.stack import in_both_modes

#: Volleys of a short run, and of each of many rounds.
SHORT, LONG = 6, 20


@in_both_modes
@pytest.mark.timeout(600)
def test_chaos(
    direct: bool,
    rounds: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    for server in ("nats", "redis", "postgresql"):
        need(server)
    seed = request.config.getoption("--seed")
    if seed is None:
        seed = random.SystemRandom().randrange(10**6)
    volleys = request.config.getoption("--volleys") or (SHORT if rounds == 1 else LONG)
    for number in range(rounds):
        directory = tmp_path / f"seed-{seed + number}"
        directory.mkdir()
        result = run(directory, seed + number, direct=direct, volleys=volleys)
        record_property(PROPERTY, json.dumps(account_of(result)))
        wrong = "\n".join(result.violations)
        assert not wrong, f"again with: {result.replay}\nlogs: {directory}\n{wrong}"
