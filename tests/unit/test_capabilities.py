"""What a server lacks, by its version."""

from __future__ import annotations

import pytest

from celery_jetstream.capabilities import (
    ATOMIC_BATCHES,
    FEATURES,
    FILTER_SUBJECTS,
    OLDEST,
    has_filter_subjects,
    lacking,
    parse,
)


@pytest.mark.parametrize(
    ("version", "lacks"),
    [
        ("2.9.10", [FILTER_SUBJECTS, ATOMIC_BATCHES]),
        ("2.9.25", [FILTER_SUBJECTS, ATOMIC_BATCHES]),
        ("v2.10.0", [ATOMIC_BATCHES]),
        ("2.11.4-binary", [ATOMIC_BATCHES]),
        ("2.12.0-RC.3", []),
        ("2.15.1", []),
        ("3.0", []),
        ("", [FILTER_SUBJECTS, ATOMIC_BATCHES]),
        ("unheard of", [FILTER_SUBJECTS, ATOMIC_BATCHES]),
    ],
)
def test_what_a_server_lacks(version, lacks):
    assert list(lacking(version)) == lacks
    assert has_filter_subjects(version) is (FILTER_SUBJECTS not in lacks)


def test_versions_are_read_as_numbers():
    assert parse("2.10.3") > parse("2.9.10")
    assert parse("2.15") == (2, 15, 0)
    assert parse("nightly") is None


def test_a_feature_says_what_it_needs_and_what_is_instead():
    assert str(ATOMIC_BATCHES) == "atomic batches (nats-server 2.12)"
    assert all(feature.since > OLDEST and feature.instead for feature in FEATURES)
