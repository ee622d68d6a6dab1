"""The bridge's book of what is on its way: copies are not lost, queues do not block each other."""

from __future__ import annotations

from celery_jetstream.delivery import Delivery
from celery_jetstream.inflight import Flight, InFlight


def delivery(sequence: int, num_delivered: int = 1) -> Delivery:
    return Delivery.from_reply(f"$JS.ACK.s.c.{num_delivered}.{sequence}.1.1700000000000000000.0")


def book(capacity: int = 8, lease: float = 100, grace: float = 10) -> InFlight:
    return InFlight(capacity=capacity, lease=lease, grace=grace)


def arrive(flights: InFlight, *sequences: int, num_delivered: int = 1) -> None:
    for sequence in sequences:
        flights.arrive(delivery(sequence, num_delivered), "a.b", b"{}")


def dispatch(flights: InFlight, now: float = 0, queue: str = "q") -> list[int]:
    """Takes, admits and dispatches what is ready; returns the sequences."""
    taken = flights.take(100)
    for flight in taken:
        flight.queue = queue
    return numbers(flights.dispatch(taken, now))


def numbers(flights: list[Flight]) -> list[int]:
    return [flight.delivery.sequence for flight in flights]


def test_room_counts_all_that_is_held() -> None:
    flights = book(capacity=4)
    arrive(flights, 1, 2)
    assert flights.room == 2
    dispatch(flights)
    assert flights.room == 2
    flights.leave(1)
    assert flights.room == 3
    assert len(flights) == 1


def test_what_waits_and_what_is_dispatched_is_kept_in_progress() -> None:
    flights = book()
    arrive(flights, 1)
    dispatch(flights)
    arrive(flights, 2)
    assert flights.replies == [delivery(1).reply, delivery(2).reply]


def test_a_queue_has_its_share_and_the_others_go_on() -> None:
    flights = book(capacity=8)  # a share of two
    arrive(flights, 1, 2, 3, 4)
    assert dispatch(flights, queue="dead") == [1, 2]
    assert flights.crowded == {"dead": 2}
    arrive(flights, 5, 6)
    assert dispatch(flights, queue="live") == [5, 6]
    flights.leave(1)  # one of the queue's was claimed
    assert dispatch(flights, queue="dead") == [3]


def test_stalled_needs_two_looks_without_a_departure() -> None:
    flights = book(capacity=8)
    arrive(flights, 1, 2, 3, 4)
    dispatch(flights, queue="dead")
    assert flights.stalled() == set()
    assert flights.stalled() == {"dead"}
    flights.leave(1)
    dispatch(flights, queue="dead")
    assert flights.stalled() == set()


def test_delivered_again_while_its_copy_is_out_there_only_renews_the_reply() -> None:
    flights = book()
    arrive(flights, 1)
    dispatch(flights)
    arrive(flights, 1, num_delivered=2)
    assert flights.take(10) == []
    assert flights.replies == [delivery(1, 2).reply]


def test_handed_back_after_the_next_delivery_came_is_dispatched_now() -> None:
    flights = book()
    arrive(flights, 1)
    dispatch(flights)
    arrive(flights, 1, num_delivered=2)  # seen before the worker's -NAK of the first
    assert flights.handed_back(1, 1)
    assert dispatch(flights) == [1]


def test_handed_back_leaves_and_its_next_delivery_is_new() -> None:
    flights = book()
    arrive(flights, 1)
    dispatch(flights)
    assert flights.handed_back(1, 1)
    assert len(flights) == 0
    arrive(flights, 1, num_delivered=2)
    assert dispatch(flights) == [1]


def test_put_back_is_first_in_line_and_dispatched_anew() -> None:
    flights = book()
    arrive(flights, 1, 2)
    taken = flights.take(10)
    for flight in taken:
        flight.queue = "q"
    assert flights.dispatch(taken, 0) == taken
    flights.put_back(taken)
    arrive(flights, 3)
    assert dispatch(flights, 1) == [1, 2]
    assert flights.crowded == {"q": 1}


def test_put_back_forgets_what_was_settled_meanwhile() -> None:
    flights = book()
    arrive(flights, 1)
    taken = flights.take(1)
    taken[0].queue = "q"
    flights.dispatch(taken, 0)
    flights.leave(1)
    flights.put_back(taken)
    assert flights.take(10) == []
    assert flights.room == 8


def test_leaving_twice_is_harmless() -> None:
    flights = book()
    arrive(flights, 1)
    dispatch(flights)
    assert flights.leave(1)
    assert not flights.leave(1)
    assert not flights.handed_back(1, 1)


def test_overdue_is_the_lease_and_the_grace_for_a_claim() -> None:
    flights = book(lease=100, grace=10)
    arrive(flights, 1)
    dispatch(flights, now=0)
    assert flights.overdue(110) == []
    (flight,) = flights.overdue(110.1)
    flights.again([flight], 110.1)
    assert flights.overdue(200) == []
    assert dispatch(flights, now=111) == [1]
    assert flight.copies == 2


def test_a_copy_is_lost_when_its_queue_was_empty_twice_since() -> None:
    flights = book()
    arrive(flights, 1)
    dispatch(flights, now=0)
    assert flights.queues_to_check() == ["q"]
    assert flights.found("q", 0, now=20) == []
    assert numbers(flights.found("q", 0, now=40)) == [1]


def test_a_copy_sent_after_the_first_empty_look_is_not_lost_at_the_second() -> None:
    flights = book()
    arrive(flights, 1)
    dispatch(flights, now=0)
    flights.found("q", 0, now=20)
    arrive(flights, 2)
    dispatch(flights, now=30)
    assert numbers(flights.found("q", 0, now=40)) == [1]
    assert numbers(flights.found("q", 0, now=60)) == [1, 2]


def test_a_queue_with_messages_loses_none() -> None:
    flights = book()
    arrive(flights, 1)
    dispatch(flights, now=0)
    flights.found("q", 0, now=20)
    flights.found("q", 3, now=40)
    assert flights.found("q", 0, now=60) == []


def test_a_copy_sent_because_the_last_was_lost_does_not_expire() -> None:
    flights = book(lease=100, grace=0)
    arrive(flights, 1)
    dispatch(flights, now=0)
    flights.found("q", 0, now=20)
    (flight,) = flights.found("q", 0, now=40)
    assert not flight.expires
    flights.again([flight], 40)
    dispatch(flights, now=41)
    assert flights.overdue(200) == []  # it would be run beside the next one
    assert numbers(flights.overdue(1100)) == [1]
    assert flight.expires


def test_stopping_takes_out_what_is_not_dispatched() -> None:
    flights = book(capacity=8)
    arrive(flights, 1, 2, 3)
    dispatch(flights)
    arrive(flights, 4)
    assert numbers(flights.leave_waiting()) == [3, 4]
    assert flights.replies == [delivery(1).reply, delivery(2).reply]


def test_the_same_number_with_another_time_is_another_message() -> None:
    """The stream was deleted and made again: it counts from 1, and nothing may take its place."""
    flights = book()
    arrive(flights, 1)
    dispatch(flights)
    new = Delivery.from_reply("$JS.ACK.s.c.1.1.1.1800000000000000000.0")
    flights.arrive(new, "a.b", b"new")
    (flight,) = flights.take(10)
    assert (flight.body, flight.delivery) == (b"new", new)


def test_hand_overs_without_an_end_are_counted_and_an_end_forgets_them() -> None:
    flights = book()
    for num_delivered in (1, 2, 3):
        arrive(flights, 1, num_delivered=num_delivered)
        (flight,) = flights.take(1)
        assert flight.unended == num_delivered
        flights.leave(1)  # claimed, and then nothing was heard any more
    flights.ended(1)  # an outage, say: the worker asked for redelivery
    arrive(flights, 1, num_delivered=4)
    assert flights.take(1)[0].unended == 1


def test_a_lost_copy_counts_as_a_hand_over_but_an_old_one_does_not() -> None:
    flights = book(lease=100, grace=0)
    arrive(flights, 1)
    dispatch(flights, now=0)
    flights.found("q", 0, now=20)
    (lost,) = flights.found("q", 0, now=40)
    flights.again([lost], 40)
    assert lost.unended == 2
    (lost,) = flights.overdue(1100)
    flights.again([lost], 1100)
    assert lost.unended == 2


def test_what_left_between_taking_and_dispatching_takes_no_share() -> None:
    flights = book(capacity=4)
    arrive(flights, 1)
    taken = flights.take(1)
    taken[0].queue = "q"
    flights.leave(1)
    assert flights.dispatch(taken, 0) == []
    arrive(flights, 2)
    assert dispatch(flights) == [2]
