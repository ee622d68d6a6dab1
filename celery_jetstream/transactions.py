"""What one database transaction wrote into the outbox, and what of it may go as one batch.

For ``jetstream_outbox_atomic``. The rows of a transaction have a ``transaction_id`` in common.
"""

from __future__ import annotations

import uuid
import weakref
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, RootTransaction

from .rows import Key

__all__ = ("MOST", "end", "first", "held_up", "transaction_id", "whole")

#: Messages of one batch; the server refuses more.
MOST = 1000

_ids: weakref.WeakKeyDictionary[RootTransaction, str] = weakref.WeakKeyDictionary()


def transaction_id(connection: Connection) -> str:
    """What the rows of a connection's transaction have in common; begins one where there is none.

    The outermost one's: a savepoint's rows share its fate, or are gone.
    """
    transaction = connection.get_transaction() or connection.begin()  # as execute() does
    return _ids.setdefault(transaction, uuid.uuid4().hex)


def end(
    rows: Sequence[Any],
    members: Sequence[Any],
    buckets: Collection[int],
    limit: int,
    *,
    last: bool = False,
) -> int:
    """How many of the first rows to take, so that no transaction is parted that need not be.

    A transaction that goes on behind these rows is left for the next ones, unless it begins with
    the first of these: then others are between its rows, too many for one look.

    Args:
        rows: in the order of their ids.
        members: all rows of their transactions.
        buckets: that may be read.
        limit: how many rows are read at a time.
        last: the next look begins anew.
    """
    if not members:
        return len(rows)
    ids, highest = {row.id for row in rows}, rows[-1].id
    sizes = Counter(member.transaction_id for member in members)
    out = [member for member in members if member.id not in ids]
    behind = {member.transaction_id for member in out}
    behind -= {
        member.transaction_id
        for member in out
        if member.id < highest
        or not member.waits
        or member.bucket not in buckets
        or sizes[member.transaction_id] > min(limit, MOST)
    }
    if not last:
        behind.discard(rows[0].transaction_id)
    return next((at for at, row in enumerate(rows) if row.transaction_id in behind), len(rows))


def first(rows: Sequence[Any], members: Sequence[Any]) -> int:
    """How many of the first rows to take for a try: one, or up to the end of its transaction."""
    if not rows:
        return 0
    its = rows[0].transaction_id
    if its not in whole(rows, members):
        return 1
    return 1 + max(at for at, row in enumerate(rows) if row.transaction_id == its)


def whole(rows: Sequence[Any], members: Sequence[Any]) -> dict[str, int]:
    """The transactions that may go as one batch, and how many rows each has.

    All that it wrote is among the rows; and no other row of one of its keys is between its first
    and its last, for the batch would have to pass that one, or be passed by it.

    Args:
        rows: in the order in which they are to be sent.
        members: all rows of their transactions, as far as these are asked about.
    """
    places = defaultdict[str | None, list[int]](list)
    of_key = defaultdict[Key, list[int]](list)
    for at, row in enumerate(rows):
        places[row.transaction_id].append(at)
        of_key[_key(row)].append(at)
    sizes = Counter(member.transaction_id for member in members)
    return {
        transaction: size
        for transaction, size in sizes.items()
        if 1 < size == len(places[transaction]) <= MOST
        and _is_apart(rows, places[transaction], of_key)
    }


def _is_apart(
    rows: Sequence[Any], places: Sequence[int], of_key: Mapping[Key, Sequence[int]]
) -> bool:
    first, last = places[0], places[-1]
    mine = rows[first].transaction_id
    for key in {_key(rows[at]) for at in places if rows[at].ordering_key}:
        its = of_key[key]
        between = its[bisect_left(its, first) : bisect_right(its, last)]
        if any(rows[at].transaction_id != mine for at in between):
            return False
    return True


def held_up(rows: Sequence[Any], together: Collection[str], blocked: Collection[Key]) -> set[str]:
    """Of the transactions that go as one, those that cannot: a key of theirs is blocked.

    Also where it is by another one that is held up.
    """
    blocked, found = set(blocked), set[str]()
    keys = defaultdict[str, set[Key]](set)
    for row in rows:
        if row.transaction_id in together and row.ordering_key:
            keys[row.transaction_id].add(_key(row))
    while more := {one for one, its in keys.items() if one not in found and its & blocked}:
        found |= more
        blocked.update(*(keys[one] for one in more))
    return found


def _key(row: Any) -> Key:
    return (row.bucket, row.subject, row.ordering_key)
