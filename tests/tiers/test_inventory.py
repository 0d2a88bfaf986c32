"""What is on disk, packed: the same pairs, few objects, small pickles."""

from __future__ import annotations

import gc
import pickle

import hypothesis.strategies as st
from hypothesis import given

from kvtc_vllm.tiers.inventory import PIECE, Inventory
from kvtc_vllm.tiers.keys import RecordKey


@given(
    st.lists(
        st.tuples(st.binary(min_size=1, max_size=100), st.integers(0, 2**63 - 1)), max_size=20
    ),
    st.integers(0, 2),
)
def test_the_pairs_are_those_given(few: list[tuple[bytes, int]], times: int) -> None:
    pairs = [(RecordKey(key), size) for key, size in few] * (1 + times * PIECE // 10)
    made = Inventory(pairs)
    assert (list(made), len(made)) == (pairs, len(pairs))
    again = pickle.loads(pickle.dumps(made))
    assert (list(again), len(again)) == (pairs, len(pairs))
    assert list(made) == pairs  # a second time


def test_many_pairs_are_few_objects_and_little_to_send() -> None:
    number = 20 * PIECE
    made = Inventory((RecordKey(place.to_bytes(32, "big")), 4096) for place in range(number))
    assert len(pickle.dumps(made)) < 42 * number
    inside = gc.get_referents(made.__dict__)
    pieces = next(found for found in inside if isinstance(found, list))
    assert len(pieces) == 20
    assert not any(gc.is_tracked(piece) for piece in pieces)
