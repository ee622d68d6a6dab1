"""Which server is tried next."""

from __future__ import annotations

import pytest

from celery_jetstream.rotation import Rotation, Server

A, B, C = ("nats://10.0.0.1:4222", "nats://10.0.0.2:4222", "nats://10.0.0.3:4222")


def urls(rotation: Rotation) -> list[str]:
    return [server.url for server in rotation.servers()]


def session(rotation: Rotation, url: str, *named: str, reached: str = "") -> None:
    """A session with the server of this URL, and the peers that it named."""
    (server,) = [server for server in rotation.servers() if server.url == url]
    rotation.learn(server, reached or server.address, named)


def test_the_servers_of_the_settings_are_each_tried_once_a_round_in_any_order() -> None:
    rotation = Rotation([A, B, C])
    rounds = {tuple(urls(rotation)) for _ in range(200)}
    assert {tuple(sorted(order)) for order in rounds} == {(A, B, C)}
    assert len(rounds) == 6


def test_the_one_that_was_lost_comes_second() -> None:
    rotation = Rotation([A, B, C])
    session(rotation, B)
    assert {urls(rotation)[1] for _ in range(50)} == {B}
    alone = Rotation([A])
    session(alone, A)
    assert urls(alone) == [A]


def test_peers_come_after_the_servers_of_the_settings() -> None:
    rotation = Rotation([A, B])
    session(rotation, A, "10.0.0.1:4222", "10.0.0.2:4222", "10.0.0.3:4222", "10.0.0.4:4222")
    for _ in range(20):
        first, second, *rest = urls(rotation)
        assert (first, second) == (B, A)
        assert sorted(rest) == [C, "nats://10.0.0.4:4222"]


def test_a_peer_that_is_no_longer_named_is_forgotten_and_a_server_of_the_settings_never() -> None:
    rotation = Rotation([A])
    session(rotation, A, "10.0.0.2:4222", "10.0.0.3:4222")
    session(rotation, C, "10.0.0.3:4222")
    assert urls(rotation) == [A, C]
    session(rotation, C)
    assert urls(rotation) == [A]


def test_the_server_that_was_reached_by_its_name_is_not_tried_twice() -> None:
    rotation = Rotation(["nats://one.example:4222"])
    session(
        rotation,
        "nats://one.example:4222",
        "10.0.0.1:4222",
        "[::1]:4222",
        reached="10.0.0.1:4222",
    )
    assert urls(rotation) == ["nats://[::1]:4222", "nats://one.example:4222"]


@pytest.mark.parametrize("credentials", ["", "us:secret@", "token@"])
@pytest.mark.parametrize("scheme", ["nats", "tls"])
def test_a_peer_is_asked_with_the_same_scheme_and_credentials(
    scheme: str, credentials: str
) -> None:
    ours = f"{scheme}://{credentials}one.example:4222"
    rotation = Rotation([ours])
    session(rotation, ours, "10.0.0.2:4333")
    assert urls(rotation)[0] == f"{scheme}://{credentials}10.0.0.2:4333"
    session(rotation, urls(rotation)[0], "10.0.0.3:4333")
    assert urls(rotation)[1] == f"{scheme}://{credentials}10.0.0.3:4333", "heirs of heirs"


@pytest.mark.parametrize(
    ("ours", "peer", "expected"),
    [
        ("tls://one.example:4222", "10.0.0.2:4222", "one.example"),
        ("tls://one.example:4222", "two.example:4222", None),
        ("tls://10.0.0.1:4222", "10.0.0.2:4222", None),
    ],
)
def test_the_certificate_of_a_bare_address_is_our_servers(
    ours: str, peer: str, expected: str | None
) -> None:
    found = Server(ours).peer(peer)
    assert found.tls_name == expected
    if expected:
        assert found.peer("10.0.0.9:4222").tls_name == expected, "also an heir's heir"


@pytest.mark.parametrize("address", ["", "10.0.0.2:port", "[::1:4222", "a b:1", "x:0"])
def test_what_is_no_address_is_left_out(address: str) -> None:
    rotation = Rotation([A])
    session(rotation, A, address, "10.0.0.2:4222")
    assert urls(rotation) == [B, A]


def test_peers_of_websockets_are_left_out() -> None:
    rotation = Rotation(["ws://one.example:80"])
    session(rotation, "ws://one.example:80", "10.0.0.2:4222")
    assert urls(rotation) == ["ws://one.example:80"]
