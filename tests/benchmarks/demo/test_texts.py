"""The demo's texts: there on every Python, long enough, and apart from what is calibrated on."""

from __future__ import annotations

import itertools
import json
import textwrap
from pathlib import Path

import pytest

from benchmarks.demo import calibration_text, documents
from benchmarks.demo.artifact import ROWS


def words(text: str) -> str:
    return " ".join(text.lower().split())


@pytest.mark.parametrize("topic", documents.TOPICS, ids=lambda topic: topic.page)
def test_a_page_is_long_and_has_the_things_that_are_asked_about(topic: documents.Topic) -> None:
    text = documents.page(topic)
    assert 0.8 * topic.characters < len(text) <= topic.characters
    for term in topic.terms:
        assert words(term) in words(text)


def test_no_page_is_part_of_another() -> None:
    # Conversations about the same text would share a prefix or at least an answer.
    pages = [words(documents.page(topic)) for topic in documents.TOPICS]
    for one, other in itertools.permutations(pages, 2):
        assert one[:400] not in other


def test_the_first_question_brings_the_text_and_the_others_do_not() -> None:
    (chat,) = documents.chats(1, 3)
    assert documents.page(documents.TOPICS[0]) in chat[0]
    assert chat[0].endswith(documents.FIRST_QUESTION)
    assert [len(question) < 100 for question in chat] == [False, True, True]


@pytest.mark.parametrize(("count", "turns"), [(0, 4), (11, 4), (3, 1), (3, 5)])
def test_other_numbers_are_refused(count: int, turns: int) -> None:
    with pytest.raises(ValueError, match=r"give a number from \d to \d+"):
        documents.chats(count, turns)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> list[calibration_text.Chat]:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    calibration_text.write(path, 8 * ROWS)
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]


def test_calibration_has_chats_of_the_asked_length(
    calibration: list[calibration_text.Chat],
) -> None:
    sizes = [sum(len(message["content"]) for message in chat) for chat in calibration]
    assert sum(sizes) >= 8 * ROWS > sum(sizes) - sizes[-1]
    assert max(sizes) < 16_000
    for chat in calibration:
        roles = [message["role"] for message in chat]
        assert roles == ["system", *["user", "assistant"] * ((len(roles) - 1) // 2)]
        assert all(message["content"].strip() for message in chat)


def test_calibration_and_questions_have_no_sentence_in_common(
    calibration: list[calibration_text.Chat],
) -> None:
    seen = words(
        " ".join(m["content"] for chat in calibration for m in chat if m["role"] != "system")
    )
    for topic in documents.TOPICS:
        for piece in textwrap.wrap(words(documents.page(topic)), 150):
            assert piece not in seen
    for chat in documents.chats(documents.MOST_CHATS, documents.MOST_TURNS):
        assert all(words(question) not in seen for question in chat)


def test_too_little_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1000000000 are needed"):
        calibration_text.write(tmp_path / "text.jsonl", 10**9)
