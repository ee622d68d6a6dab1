"""The events of the outbox benchmarks, alike for all: their bodies, and what was stored of them."""

from __future__ import annotations

import json
import zlib
from typing import Any

#: Bytes of a message's body, envelope and all.
SIZE = 500
#: So many keys have the events among them.
KEYS = 100


def key(number: int) -> str:
    """The key of an event: any of them, and always the same."""
    return f"customer-{zlib.crc32(b'%d' % number) % KEYS}"


def payload(number: int, size: int = SIZE) -> dict[str, Any]:
    """A payload whose JSON has so many bytes."""
    made = {"number": number, "key": key(number), "status": "paid", "total": "129.90", "note": ""}
    made["note"] = "n" * (size - len(json.dumps(made, separators=(",", ":"))))
    return made


def read(body: bytes) -> tuple[int, str]:
    """The number and the key of an event, from a body that is a payload or an envelope with one."""
    found = json.loads(body)
    made = found.get("payload", found)
    return made["number"], made["key"]


def inversions(stored: list[tuple[int, str]]) -> int:
    """How often an event was stored after a later one of its key."""
    last: dict[str, int] = {}
    found = 0
    for number, mine in stored:
        found += number < last.get(mine, number)
        last[mine] = max(number, last.get(mine, number))
    return found
