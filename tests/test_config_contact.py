"""``KEY@HOST:PORT``: what is read is written back the same, and an error names the part that is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime_async.config.contact import MAX_HOST_LENGTH, Contact, is_host
from prime_async.errors import ConfigError

KEY = "0123456789abcdef" * 4

hosts = (
    st.sampled_from(["localhost", "a", "node-1.example.org", "under_score", "example.org."])
    | st.ip_addresses(v=4).map(str)
    | st.ip_addresses(v=6).map(str)
    | st.just("fe80::1%eth0")
)
contacts = st.builds(
    Contact,
    id=st.text("0123456789abcdef", min_size=64, max_size=64),
    host=hosts,
    port=st.integers(1, 65535),
)


@given(contacts)
def test_a_contact_reads_back_as_it_was_written(contact: Contact) -> None:
    assert Contact.parse(str(contact)) == contact


def test_an_ipv6_host_stands_in_brackets_outside_and_without_them_inside() -> None:
    contact = Contact.parse(f"{KEY}@[2001:db8::1]:7700")

    assert contact == Contact(KEY, "2001:db8::1", 7700)
    assert str(contact) == f"{KEY}@[2001:db8::1]:7700"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", 'expected KEY@HOST:PORT, got ""'),
        (KEY, f'expected KEY@HOST:PORT, got "{KEY}"'),
        (f"{KEY}@example.org", f'expected KEY@HOST:PORT, got "{KEY}@example.org"'),
        ("abc@h:1", 'expected 64 lower-case hexadecimal digits before the "@", got "abc"'),
        (
            f"{KEY.upper()}@h:1",
            f'expected 64 lower-case hexadecimal digits before the "@", got "{KEY.upper()}"',
        ),
        (f"{KEY}@h:0", 'expected a port from 1 to 65535 after the last ":", got "0"'),
        (f"{KEY}@h:65536", 'expected a port from 1 to 65535 after the last ":", got "65536"'),
        (f"{KEY}@h:", 'expected a port from 1 to 65535 after the last ":", got ""'),
        (f"{KEY}@h:+1", 'expected a port from 1 to 65535 after the last ":", got "+1"'),
        (f"{KEY}@h:٣", 'expected a port from 1 to 65535 after the last ":", got "٣"'),
        (f"{KEY}@:1", 'expected a host name or address between the "@" and the last ":", got ""'),
        (f"{KEY}@a b:1", 'expected a host name or address between the "@" and the last ":", got "a b"'),
        (f"{KEY}@[::zz]:1", 'expected a host name or address between the "@" and the last ":", got "[::zz]"'),
        (f"{KEY}@tcp://h:1", 'expected KEY@HOST:PORT without "tcp://", got "tcp://h:1" after the "@"'),
        (
            f"{KEY}@2001:db8::1:1",
            'expected an IPv6 address in brackets, as in "[2001:db8::1]:7700", got "2001:db8::1"',
        ),
    ],
)
def test_an_error_names_the_part_that_is_wrong(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Contact.parse(text)

    assert caught.value.problems == (problem,)


@pytest.mark.parametrize(
    "text", ["", "a b", "-", "[::1]", "h:1", "fe80::1%a b", "tcp://h", "h" * (MAX_HOST_LENGTH + 1)]
)
def test_what_is_no_host_is_told_apart(text: str) -> None:
    assert not is_host(text)


def test_the_longest_host_still_fits_into_an_address_of_the_protocol() -> None:
    longest = Contact(KEY, f"fe80::1%{'e' * (MAX_HOST_LENGTH - 8)}", 65535)
    assert len(f"tcp://{str(longest).removeprefix(KEY + '@')}") <= 256
