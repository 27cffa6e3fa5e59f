"""The string with which somebody joins a run."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime_async.config.contact import Contact
from prime_async.config.invitation import PREFIX, Invitation
from prime_async.errors import ConfigError

MEMBERS = st.lists(
    st.builds(
        Contact,
        st.binary(min_size=32, max_size=32).map(bytes.hex),
        st.sampled_from(["10.1.2.3", "a.example", "2001:db8::2"]),
        st.integers(1, 65535),
    ),
    min_size=1,
    max_size=8,
)
INVITATIONS = st.builds(
    Invitation,
    name=st.text(st.characters(codec="utf-8"), max_size=64),
    run_id=st.binary(min_size=32, max_size=32),
    members=MEMBERS.map(tuple),
    encrypt=st.booleans(),
    token=st.none() | st.binary(min_size=32, max_size=32),
)
ONE = Invitation(name="tiny", run_id=bytes(32), members=(Contact("ab" * 32, "10.1.2.3", 7700),), token=b"t" * 32)


@given(INVITATIONS)
def test_a_string_says_what_it_was_made_of(invitation: Invitation) -> None:
    assert Invitation.parse(str(invitation)) == invitation


@given(INVITATIONS, st.data())
def test_a_string_that_lost_or_changed_a_character_is_refused(invitation: Invitation, data: st.DataObject) -> None:
    text = str(invitation)
    place = data.draw(st.integers(len(PREFIX), len(text) - 1))
    other = data.draw(st.sampled_from([c for c in "Aa0-_" if c != text[place]]))
    for broken in (text[:place] + text[place + 1 :], text[:place], text[:place] + other + text[place + 1 :]):
        with suppress(ConfigError):
            assert Invitation.parse(broken) == invitation  # the last character has bits that mean nothing


def test_white_space_that_a_mail_program_added_is_left_out() -> None:
    text = str(ONE)
    assert Invitation.parse(f"  {text[:40]}\n  {text[40:]}\n") == ONE


def test_the_token_is_not_shown_but_in_the_string() -> None:
    assert "token" not in repr(ONE)
    assert Invitation.parse(str(ONE)).token == b"t" * 32


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", 'begins with "prime-async:"'),
        ("https://example.org", 'begins with "prime-async:"'),
        (PREFIX, "not whole"),
        (PREFIX + "A" * 10_000, "at most 8192 characters"),
        (PREFIX + "A*A", "a character that none has"),
        (str(ONE)[:-6], "not whole"),
    ],
)
def test_what_is_no_join_string_is_refused_with_what_to_do(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Invitation.parse(text)
