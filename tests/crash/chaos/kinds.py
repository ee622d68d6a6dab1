"""The numbered events of the chaos runs, and what must become of each kind."""

from __future__ import annotations

import random
from typing import Any

__all__ = ("AROUND", "DEAD", "KINDS", "PLAIN", "WITHIN", "payload_of")

#: How many of a hundred events, about.
KINDS = {
    "paid.order": 50,
    "passed.on": 12,
    "retried.order": 8,
    "slow.order": 4,
    "noted.order": 12,
    "plain.order": 11,
    "poison.value": 1,
    "poison.rejected": 1,
    "unknown.order": 1,
}
#: Handled in the transaction of the inbox row: each has one effect.
WITHIN = ("paid.order", "passed.on", "retried.order", "slow.order")
#: Handled between the inbox's two marks, or with no inbox: each has one effect at least.
AROUND, PLAIN = ("noted.order",), ("plain.order",)
#: Become dead letters, and why.
DEAD = {
    "poison.value": "unrecoverable_error",
    "poison.rejected": "rejected",
    "unknown.order": "no_handler",
}


def payload_of(kind: str, dice: random.Random) -> dict[str, Any]:
    """What the handler is told to do: how often to fail, and how long to take."""
    if kind == "retried.order":
        return {"fail": dice.randint(1, 2)}
    if kind == "slow.order":
        return {"seconds": dice.uniform(0.1, 1)}
    return {}
