"""Conversations that are made up, and those that are read from a trace."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from kvtc_vllm.load_test.errors import LoadTestError
from kvtc_vllm.load_test.trace import TraceForm, read_trace
from kvtc_vllm.load_test.traffic import Traffic, conversations, zipf_weights


def test_equal_seeds_give_equal_conversations_and_others_do_not() -> None:
    traffic = Traffic(conversations=5, documents=3)
    assert conversations(traffic) == conversations(traffic)
    assert conversations(traffic) != conversations(Traffic(conversations=5, documents=3, seed=1))


def test_lengths_are_as_asked() -> None:
    traffic = Traffic(
        conversations=3, turns=2, prefix_tokens=10, document_tokens=100, question_tokens=7
    )
    for one in conversations(traffic):
        assert len(one.system.split()) == 10
        assert [len(turn.text.split()) for turn in one.turns] == [107, 7]
        assert one.turns[0].think_seconds == 0 < one.turns[1].think_seconds
    # No pool: every conversation reads its own document, and all share one system message.
    assert len({one.turns[0].text for one in conversations(traffic)}) == 3
    assert len({one.system for one in conversations(traffic)}) == 1


def test_documents_are_popular_by_zipf() -> None:
    weights = zipf_weights(10, 1.0)
    assert sum(weights) == pytest.approx(1)
    assert weights[0] / weights[4] == pytest.approx(5)
    traffic = Traffic(conversations=4000, turns=1, documents=10, document_tokens=5)
    found = Counter(one.turns[0].text.split("\n")[0] for one in conversations(traffic))
    shares = [count / 4000 for _, count in found.most_common()]
    assert shares == pytest.approx(weights, abs=0.03)


@pytest.mark.parametrize(("name", "value"), [("turns", 0), ("zipf", -1), ("answer_tokens", 0)])
def test_values_out_of_range_are_named(name: str, value: int) -> None:
    with pytest.raises(LoadTestError, match=f"{name} is {value}, "):
        Traffic(**{name: value})


def test_a_trace_has_all_four_forms(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 3000, "input_length": 40, "output_length": 9, "hash_ids": [1, 2, 3]},
        {"timestamp": 1000, "input_length": 32, "output_length": 5, "hash_ids": [1, 2]},
        {"prompt": "how so", "output_tokens": 7},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}] * 2},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    found = read_trace(path, TraceForm(16, 1e-3, 11, 0.5))
    assert [one.start_seconds for one in found] == [None, None, None, 1.0, 3.0]
    prompt, shared, system, short, long = found
    assert (prompt.turns[0].text, prompt.turns[0].output_tokens) == ("how so", 7)
    assert [(t.text, t.output_tokens, t.think_seconds) for t in shared.turns] == [
        ("a", 11, 0.0),
        ("a", 11, 0.5),
    ]
    assert (system.system, system.turns[0].text) == ("s", "u")
    # Equal hash ids are equal text, and the last block is as long as what is left.
    assert len(short.turns[0].text.split()) == 32
    assert len(long.turns[0].text.split()) == 40
    assert long.turns[0].text.startswith(short.turns[0].text)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1"),
        ('{"prompt": 3}', "int where text"),
        ('{"hash_ids": [1]}', "'input_length' is missing"),
        ('{"hash_ids": [1], "input_length": 0}', "input_length is 0"),
        ('{"prompt": "a", "output_length": 0}', "length of the answer is 0"),
        ("{}", "none of hash_ids"),
        ("[]", "line 1"),
        ("", "has no lines"),
    ],
)
def test_a_bad_line_is_named(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(LoadTestError, match="trace") as error:
        read_trace(path, TraceForm())
    assert words in str(error.value)


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadTestError, match="cannot be read"):
        read_trace(tmp_path / "gone", TraceForm())
