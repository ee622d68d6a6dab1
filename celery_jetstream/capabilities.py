"""What a nats-server can, by its version.

A server ignores what its version does not know, and says nothing: 2.9 answers a consumer with
``filter_subjects`` by one that takes every message. So whoever needs one of these asks here first.
Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = (
    "ATOMIC_BATCHES",
    "FEATURES",
    "FILTER_SUBJECTS",
    "OLDEST",
    "Feature",
    "Version",
    "has",
    "has_filter_subjects",
    "lacking",
    "parse",
)

Version = tuple[int, int, int]

OLDEST: Version = (2, 9, 10)
"""The oldest nats-server that we support: Debian 12's."""


@dataclass(frozen=True)
class Feature:
    """Something that not every nats-server has, and that we use where it is there.

    Attributes:
        name: as NATS calls it.
        since: the first version that has it.
        instead: what happens on an older server.
        setting: the setting that asks for it; "" where we do.
    """

    name: str
    since: Version
    instead: str
    setting: str = ""

    def __str__(self) -> str:
        return f"{self.name} (nats-server {'.'.join(map(str, self.since[:2]))})"


FILTER_SUBJECTS = Feature(
    "filter_subjects", (2, 10, 0), "each source app has a consumer of its own"
)
ATOMIC_BATCHES = Feature(
    "atomic batches", (2, 12, 0), "events are published one by one", "jetstream_outbox_atomic"
)
FEATURES = (FILTER_SUBJECTS, ATOMIC_BATCHES)


def parse(version: str) -> Version | None:
    """Read ``2.15.1``, ``v2.9.10`` or ``2.12.0-RC.3``; None where it is no version."""
    found = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", version)
    if found is None:
        return None
    major, minor, patch = found.groups("0")
    return int(major), int(minor), int(patch)


def has(version: str, feature: Feature) -> bool:
    """Tell whether a server of this version has it. What is no version has nothing."""
    found = parse(version)
    return found is not None and found >= feature.since


def has_filter_subjects(version: str) -> bool:
    """Tell whether one consumer can take the messages of several subjects."""
    return has(version, FILTER_SUBJECTS)


def lacking(version: str) -> tuple[Feature, ...]:
    """Return what a server of this version lacks."""
    return tuple(feature for feature in FEATURES if not has(version, feature))
