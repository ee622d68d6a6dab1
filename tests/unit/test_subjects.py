"""The subject grammar against plain references: regular expressions, and sets of subjects."""

from __future__ import annotations

import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_jetstream import subjects
from celery_jetstream.exceptions import SubjectError

TOKENS = st.text("abc", min_size=1, max_size=2)
SUBJECTS = st.lists(TOKENS, min_size=1, max_size=6).map(".".join)
PATTERNS = st.builds(
    lambda head, last: ".".join([*head, last]),
    st.lists(TOKENS | st.just("*"), max_size=5),
    TOKENS | st.sampled_from("*>"),
)

# Every subject of up to 4 tokens and every pattern of up to 3, over a small alphabet. What
# patterns of 3 tokens have in common shows in subjects of 3 tokens, and ">" in one more.
ALL_SUBJECTS = [".".join(tokens) for n in range(1, 5) for tokens in product("abc", repeat=n)]
ALL_PATTERNS = [
    ".".join([*head, last])
    for n in range(3)
    for head in product("ab*", repeat=n)
    for last in "ab*>"
]


def reference_matches(pattern: str, subject: str) -> bool:
    """Match as a regular expression would."""
    text = re.escape(pattern).replace(r"\*", r"[^.]+").replace(">", r".+")
    return re.fullmatch(text, subject) is not None


MATCHED = {
    pattern: frozenset(s for s in ALL_SUBJECTS if reference_matches(pattern, s))
    for pattern in ALL_PATTERNS
}


# -- names -----------------------------------------------------------------------------------


def test_names_of_the_wire_contract() -> None:
    assert subjects.publish_subject("api", "worker") == "api.sync.worker"
    assert subjects.consume_subject("api", "worker") == "worker.sync.api"
    assert subjects.dead_letter_subject("api") == "api.sync.dlq"
    assert subjects.durable_name("api") == "api-workers"


def test_one_publishes_where_the_other_consumes() -> None:
    assert subjects.publish_subject("a-1", "b_2") == subjects.consume_subject("b_2", "a-1")


BAD_TOKENS = [
    "", "a.b", "*", ">", "a*", "a b", " a", "a\n", "a\tb", "a\x00", "é", "a/b", "$JS", "a" * 256,
    None, 5, b"api",
]  # fmt: skip


@pytest.mark.parametrize("value", BAD_TOKENS)
def test_a_bad_app_name_is_refused_everywhere(value: str) -> None:
    for name_it in (
        subjects.validate_app_name,
        subjects.dead_letter_subject,
        subjects.durable_name,
        lambda name: subjects.publish_subject(name, "worker"),
        lambda name: subjects.publish_subject("api", name),
        lambda name: subjects.consume_subject("api", name),
    ):
        with pytest.raises(SubjectError):
            name_it(value)


@pytest.mark.parametrize("value", ["api", "API", "a-b_c9", "0", "-", "a" * 255, "dlq"])
def test_a_token_is_returned(value: str) -> None:
    assert subjects.validate_token(value, "app_name") == value


def test_nobody_is_called_dlq() -> None:
    assert subjects.validate_app_name("dlq2") == "dlq2"
    with pytest.raises(SubjectError, match=r"app_name 'dlq'.*dead-letter"):
        subjects.validate_app_name("dlq")
    with pytest.raises(SubjectError, match="destination_app 'dlq'"):
        subjects.publish_subject("api", "dlq")


def test_a_refusal_names_role_value_and_rule() -> None:
    with pytest.raises(SubjectError) as caught:
        subjects.publish_subject("api", "my.worker")
    assert str(caught.value) == (
        "destination_app 'my.worker' is not legal: use 1 to 255 letters, digits, '-' and '_'"
    )
    assert caught.value.subject == "my.worker"


def test_a_refusal_shortens_a_long_value() -> None:
    with pytest.raises(SubjectError) as caught:
        subjects.validate_subject("x" * 10_000)
    assert len(str(caught.value)) < 200


def test_subjects_and_names_of_names_are_measured_as_a_whole() -> None:
    assert len(subjects.publish_subject("a" * 125, "b" * 124)) == 255
    with pytest.raises(SubjectError, match="256 characters"):
        subjects.publish_subject("a" * 125, "b" * 125)
    with pytest.raises(SubjectError, match="durable name"):
        subjects.durable_name("a" * 250)


@pytest.mark.parametrize("value", ["jetstream-bridge-stream", "A_1", "é", "$x", "s" * 255])
def test_stream_names(value: str) -> None:
    assert subjects.validate_stream_name(value) == value


@pytest.mark.parametrize(
    "value",
    ["", "a.b", "a*", ">", "a b", "a\u00a0b", "a\r", "a/b", "a\\b", "\x7f", "s" * 256, "é" * 128,
     "\ud800", None, 1],
)  # fmt: skip
def test_bad_stream_names(value: str) -> None:
    with pytest.raises(SubjectError, match="stream name"):
        subjects.validate_stream_name(value)


# -- subjects and patterns -------------------------------------------------------------------


@pytest.mark.parametrize("subject", ["a", "api.sync.worker", "ä.b", "a.$b", "x" * 255, "a-b.INBOX"])
def test_a_concrete_subject_is_returned(subject: str) -> None:
    assert subjects.validate_subject(subject) == subject


@pytest.mark.parametrize(
    ("subject", "rule"),
    [
        ("", "empty"),
        (".", "empty"),
        ("a..b", "empty"),
        (".a", "empty"),
        ("a.", "empty"),
        ("a.*", "wildcards"),
        ("a.>", "wildcards"),
        ("a*.b", "wildcards"),
        ("a b", "whitespace"),
        ("a\u2003b", "whitespace"),
        ("a\r\nPUB x", "whitespace"),
        ("a\x00", "control"),
        ("a\ud800", "control"),
        ("x" * 256, "more than 255"),
        ("$JS.API.STREAM.DELETE.x", "server"),
        ("$KV.b.k", "server"),
        ("$SYS", "server"),
        ("_INBOX.x", "server"),
        ("_INBOX_api.x", "server"),
        (None, "text"),
        (b"a.b", "text"),
    ],
)
def test_a_bad_subject_is_refused(subject: str, rule: str) -> None:
    with pytest.raises(SubjectError, match=rf"(?s)^subject .*{rule}"):
        subjects.validate_subject(subject)


@pytest.mark.parametrize("pattern", ["a", "*", ">", "a.*", "*.*.b", "a.>", "*.>", "order.created"])
def test_a_pattern_is_returned(pattern: str) -> None:
    assert subjects.validate_pattern(pattern) == pattern


@pytest.mark.parametrize(
    "pattern",
    ["", "a..b", "a.", "a*", "*a.b", "a.>.b", ">.a", ">.*", ">.>", "a>", "a.>>", "**", "a b.*",
     "a.\x1f", "*." * 127 + "ab", None, 3],
)  # fmt: skip
def test_a_bad_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(SubjectError, match=r"^pattern "):
        subjects.validate_pattern(pattern)


@given(st.text(max_size=12))
def test_what_is_a_subject_is_also_a_pattern(text: str) -> None:
    if subjects.fault(text) is None:
        assert subjects.fault(text, wildcards=True) is None
        assert not set(text) & set("*> \r\n\t\x00")


# -- wildcards -------------------------------------------------------------------------------


def test_matching_agrees_with_regular_expressions_on_every_small_case() -> None:
    for pattern, matched in MATCHED.items():
        assert {s for s in ALL_SUBJECTS if subjects.matches(pattern, s)} == matched, pattern


@given(PATTERNS, SUBJECTS)
def test_matching_agrees_with_regular_expressions(pattern: str, subject: str) -> None:
    assert subjects.matches(pattern, subject) == reference_matches(pattern, subject)


def test_a_tail_wildcard_needs_a_token() -> None:
    assert subjects.matches("a.>", "a.b.c")
    assert not subjects.matches("a.>", "a")
    assert not subjects.overlap("a.>", "a")


def test_wildcards_in_the_subject_are_text() -> None:
    assert not subjects.matches("user.created", "user.*")
    assert not subjects.matches("user.created", ">")


def test_overlap_means_a_common_subject_in_every_small_case() -> None:
    for a, b in product(ALL_PATTERNS, repeat=2):
        assert subjects.overlap(a, b) == (not MATCHED[a].isdisjoint(MATCHED[b])), (a, b)


@given(PATTERNS, PATTERNS)
def test_overlap_is_symmetric(a: str, b: str) -> None:
    assert subjects.overlap(a, b) == subjects.overlap(b, a)
    assert subjects.overlap(a, a)


@given(st.lists(PATTERNS, min_size=2, max_size=4), SUBJECTS)
def test_patterns_that_match_one_subject_overlap(patterns: list[str], subject: str) -> None:
    found = [pattern for pattern in patterns if subjects.matches(pattern, subject)]
    assert all(subjects.overlap(a, b) for a, b in product(found, repeat=2))


# -- specificity -----------------------------------------------------------------------------


def test_specificity_order() -> None:
    ordered = ["order.created", "order.created.>", "order.*", "order.*.x", "order.>", "*.created",
               "*.*", "*.>", ">"]  # fmt: skip
    assert sorted(set(ordered), key=subjects.specificity) == ordered


def test_what_matches_a_part_of_another_comes_first_in_every_small_case() -> None:
    for a, b in product(ALL_PATTERNS, repeat=2):
        if MATCHED[a] < MATCHED[b]:
            assert subjects.specificity(a) < subjects.specificity(b), (a, b)


def test_patterns_that_match_one_subject_never_tie() -> None:
    for subject in ALL_SUBJECTS:
        keys = [subjects.specificity(p) for p in ALL_PATTERNS if subject in MATCHED[p]]
        assert len(set(keys)) == len(keys), subject


@given(SUBJECTS, st.lists(st.booleans(), min_size=6, max_size=6), st.integers(1, 6))
def test_the_literal_pattern_wins(subject: str, stars: list[bool], length: int) -> None:
    tokens = ["*" if star else t for t, star in zip(subject.split("."), stars, strict=False)]
    wider = [".".join(tokens), ".".join([*tokens[: length - 1], ">"])]
    found = [pattern for pattern in wider if subjects.matches(pattern, subject)]
    assert len(found) == 1 + (length <= len(tokens))
    assert min([*found, subject], key=subjects.specificity) == subject
