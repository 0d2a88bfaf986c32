"""Returns are measured in turns and confirmed by counters."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.demo.server import Answer
from benchmarks.serving.__main__ import expected_reload, parse_lengths
from benchmarks.serving.measure import measure, table
from benchmarks.serving.prompts import NEW_TOKENS, cut

CHUNK = 128
LOG: list[str] = []


class FakeServer:
    """Counts as a connector does that reloads whole chunks of what it has seen; or computes."""

    def __init__(self, name: str, seconds: float, offload: bool, miscounts: bool = False) -> None:
        self.name, self.seconds, self.offload, self.miscounts = name, seconds, offload, miscounts
        self.seen: list[tuple[int, ...]] = []
        self.cached = True
        self.values = dict.fromkeys(
            (
                "external_prefix_cache_hits",
                "kvtc_hit_tokens",
                "kvtc_loaded_tokens",
                "kvtc_loaded_bytes",
                "kvtc_loaded_raw_bytes",
                "prefix_cache_hits",
            ),
            0.0,
        )

    def complete(self, token_ids: list[int], max_tokens: int) -> Answer:
        LOG.append(self.name)
        past = tuple(token_ids[: (len(token_ids) - NEW_TOKENS) // CHUNK * CHUNK])
        known = any(text[: len(past)] == past for text in self.seen)
        if known and self.offload:
            tokens = len(past)
            self.values["external_prefix_cache_hits"] += tokens
            self.values["kvtc_hit_tokens"] += tokens
            self.values["kvtc_loaded_tokens"] += tokens - CHUNK * self.miscounts
            self.values["kvtc_loaded_bytes"] += tokens
            self.values["kvtc_loaded_raw_bytes"] += 8 * tokens
        if known and self.cached:
            self.values["prefix_cache_hits"] += CHUNK
        self.seen.append(tuple(token_ids))
        self.cached = True
        return Answer("", self.seconds * len(token_ids), len(token_ids))

    def settle(self) -> dict[str, float]:
        return {f"vllm:{name}": value for name, value in self.values.items()}

    def forget(self) -> None:
        self.cached = False


def prompts() -> list[object]:
    return list(cut(range(5000), [512, 1024], rounds=4))


def test_rows_tell_times_ratios_and_bytes() -> None:
    LOG.clear()
    servers = {"recompute": FakeServer("r", 1.0, False), "kvtc-8x": FakeServer("k", 0.25, True)}
    rows = list(measure(servers, "recompute", prompts(), [384, 896], pause=0))  # type: ignore[arg-type]
    assert [(r.name, r.tokens, r.reloaded) for r in rows] == [
        ("recompute", 512, 0),
        ("kvtc-8x", 512, 384),
        ("recompute", 1024, 0),
        ("kvtc-8x", 1024, 896),
    ]
    assert [r.ratio for r in rows] == [1, 0.25, 1, 0.25]
    assert [r.real_ratio for r in rows] == [0, 8, 0, 8]
    assert rows[3].ttft_ms == 256_000
    assert rows[3].loaded_bytes == 896
    # A round that is not counted and three that are, another server first in each.
    assert len(rows[0].samples_ms) == 3
    assert "".join(LOG[:10]) == "rk" + "rk" + "kr" + "rk" + "kr"
    assert len(table(rows).splitlines()) == 5


def test_a_counter_that_disagrees_is_an_error() -> None:
    servers = {"recompute": FakeServer("r", 1.0, False), "raw": FakeServer("k", 0.2, True, True)}
    with pytest.raises(RuntimeError, match=r"raw, 512 tokens: 384 should come.*'kvtc_loaded_tok"):
        list(measure(servers, "recompute", prompts(), [384, 896], pause=0))  # type: ignore[arg-type]


def test_a_return_out_of_vllms_own_cache_is_an_error() -> None:
    class Unforgetting(FakeServer):
        def forget(self) -> None:
            pass

    servers = {"recompute": Unforgetting("r", 1.0, False)}
    with pytest.raises(RuntimeError, match="prefix_cache_hits 128"):
        list(measure(servers, "recompute", prompts(), [384, 896], pause=0))  # type: ignore[arg-type]


def test_prompts_begin_differently_and_every_end_is_new() -> None:
    first, second = cut(range(5000), [512, 1024], rounds=4)
    assert (first.length, second.length) == (512, 1024)
    assert len(first.of_round(3)) == 512
    pieces = [first.past, *first.ends, second.past, *second.ends]
    for one, other in itertools.combinations(pieces, 2):
        assert not set(one) & set(other)


def test_a_text_that_is_too_short_is_told() -> None:
    with pytest.raises(ValueError, match="has 1000 tokens; these lengths need 1536"):
        cut(range(1000), [512, 1024], rounds=1)


@pytest.mark.parametrize(
    ("length", "expected"), [(1024, 896), (2048, 1920), (7168, 7040), (512, 384)]
)
def test_all_presets_reload_as_much(length: int, expected: int) -> None:
    assert {expected_reload(name, length) for name in ("raw", "kvtc-8x", "kvtc-16x")} == {expected}


@pytest.mark.parametrize("text", ["", "1024,", "12", "1024,x", "-1024"])
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--lengths"):
        parse_lengths(text)
