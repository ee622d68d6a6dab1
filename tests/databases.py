"""What a test is told of its database."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ("Database",)


@dataclass(frozen=True)
class Database:
    """An empty database of one test.

    Attributes:
        kind: "postgresql", "mariadb" or "sqlite".
        url: For ``create_engine``.
        async_url: For ``create_async_engine``; empty where we test with no such driver.
    """

    kind: str
    url: str
    async_url: str = ""
