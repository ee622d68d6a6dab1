"""Which rows may go as one batch, and how far a read is taken."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import create_engine

from celery_jetstream.transactions import MOST, end, first, held_up, transaction_id, whole


def rows(words: str, start: int = 1) -> list[Any]:
    """Of ``"A:k B:m -"`` a row each: its transaction (``-`` for none), and its key if any."""
    made = []
    for number, word in enumerate(words.split(), start):
        transaction, _, key = word.partition(":")
        made.append(
            SimpleNamespace(
                id=number,
                transaction_id=None if transaction == "-" else transaction,
                bucket=0,
                subject="s",
                ordering_key=key,
                waits=1,
            )
        )
    return made


def members(*some: Sequence[Any]) -> list[Any]:
    return [row for one in some for row in one if row.transaction_id]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("A A B B B - C", {"A": 2, "B": 3}),
        ("A:k A:k B:k B:m", {"A": 2, "B": 2}),
        ("A:k B:m A:k B:m", {"A": 2, "B": 2}),
        ("A B A B", {"A": 2, "B": 2}),
        ("A:k B:k A:k", {}),
        ("A:k B:m B:k A:m", {"B": 2}),
        ("A:k -:m A:m", {}),
        ("-:m A:k A:m -:k", {"A": 2}),
        ("A:k B:k C:m A:m B:n C:n", {"B": 2}),
        ("A - A", {"A": 2}),
        ("- -:k", {}),
    ],
)
def test_what_goes_as_one(words: str, expected: dict[str, int]) -> None:
    found = rows(words)
    assert whole(found, members(found)) == expected


def test_what_is_not_all_there_does_not() -> None:
    found = rows("A A B B")
    assert whole(found, members(found, rows("A", 9))) == {"B": 2}


@pytest.mark.parametrize("count", [MOST, MOST + 1])
def test_what_is_too_much_for_the_server_does_not(count: int) -> None:
    found = rows("A " * count)
    assert whole(found, members(found)) == ({"A": MOST} if count == MOST else {})


@pytest.mark.parametrize("seed", range(20))
def test_batches_and_keys_never_wait_for_each_other_in_a_circle(seed: int) -> None:
    chance = random.Random(seed)
    found = rows(" ".join(f"{chance.choice('ABCDEF-')}:{chance.choice('klmn')}" for _ in range(14)))
    together = whole(found, members(found))
    unit = [row.transaction_id if row.transaction_id in together else row.id for row in found]
    waiting: dict[object, set[object]] = {one: set() for one in unit}
    for at, row in enumerate(found):
        before = [n for n in range(at) if found[n].ordering_key == row.ordering_key]
        waiting[unit[at]] |= {unit[n] for n in before} - {unit[at]}
    while free := [one for one, others in waiting.items() if not others & waiting.keys()]:
        for one in free:
            del waiting[one]
    assert not waiting


@pytest.mark.parametrize(
    ("words", "more", "limit", "expected"),
    [
        ("A A B B", "", 4, 4),
        ("A A B B", "B", 4, 2),
        ("A B A B", "B", 4, 1),
        ("A A A A", "A", 4, 4),
        ("A B B A", "A", 4, 4),
        ("- A A B", "B A", 4, 1),
        ("- A A A", "A A", 4, 4),
    ],
)
def test_a_read_ends_before_a_transaction_that_goes_on(
    words: str, more: str, limit: int, expected: int
) -> None:
    found = rows(words)
    assert end(found, members(found, rows(more, 9)), [0], limit) == expected


@pytest.mark.parametrize(
    "change", [{"bucket": 1}, {"waits": 0}, {"id": 0}], ids=["another's", "sent", "passed over"]
)
def test_a_read_does_not_wait_for_what_will_not_come(change: dict[str, int]) -> None:
    found, more = rows("A A B B"), rows("B", 9)
    vars(more[0]).update(change)
    assert end(found, members(found, more), [0], 4) == 4


def test_at_the_end_of_what_was_learned_a_transaction_waits_for_the_next_sweep() -> None:
    found, more = rows("A A"), rows("A", 9)
    assert end(found, members(found, more), [0], 4, last=True) == 0
    assert end(found, [], [0], 4, last=True) == 2


@pytest.mark.parametrize(
    ("words", "expected"), [("A A B", 2), ("A - A B", 3), ("- A A", 1), ("A B", 1), ("", 0)]
)
def test_a_try_is_of_one_row_or_one_transaction(words: str, expected: int) -> None:
    found = rows(words)
    assert first(found, members(found)) == expected


def test_a_key_that_is_blocked_holds_up_its_transactions_and_those_behind_them() -> None:
    found = rows("A:k A:m B:m B:n C:o C:p - D:k")
    blocked = {(0, "s", "k")}
    assert held_up(found, set("ABC"), blocked) == {"A", "B"}
    assert held_up(found, set(), blocked) == set()
    assert blocked == {(0, "s", "k")}


def test_a_transaction_is_the_connections() -> None:
    with create_engine("sqlite://").connect() as connection:
        one = transaction_id(connection)
        assert connection.in_transaction()
        with connection.begin_nested():
            assert transaction_id(connection) == one
        connection.commit()
        with connection.begin():
            other = transaction_id(connection)
            assert transaction_id(connection) == other
        assert len({one, other, transaction_id(connection)}) == 3
        assert {len(one), len(other)} == {32}
