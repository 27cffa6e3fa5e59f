"""Which chunks a round exchanges."""

from __future__ import annotations

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from prime_async.machines.fragments import Fragments

sizes = st.integers(1, 300).flatmap(lambda n: st.builds(Fragments, st.just(n), st.integers(1, n)))


@given(sizes, st.integers(0, 1000))
def test_each_chunk_is_exchanged_once_in_as_many_rounds_as_there_are_fragments(
    fragments: Fragments, first: int
) -> None:
    rounds = range(first, first + fragments.count)
    exchanged = sorted(chain.from_iterable(map(fragments.chunks, rounds)))
    assert exchanged == list(range(fragments.chunk_count))


@given(sizes)
def test_fragments_are_of_equal_size_but_for_a_chunk(fragments: Fragments) -> None:
    lengths = [len(fragments.chunks(round)) for round in range(fragments.count)]
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1


@given(sizes, st.data())
def test_a_chunk_is_in_the_fragment_that_holds_it(fragments: Fragments, data: st.DataObject) -> None:
    chunk = data.draw(st.integers(0, fragments.chunk_count - 1))
    assert chunk in fragments.chunks(fragments.holding(chunk))


def test_one_fragment_is_all_of_it() -> None:
    assert {Fragments(5).chunks(round) for round in range(3)} == {range(5)}
