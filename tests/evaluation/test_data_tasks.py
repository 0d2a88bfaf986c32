"""Tasks over public documents: their part only, the model's template, answers in reach."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kvtc_vllm.evaluation.data.public import PARTS, DataError, Source
from kvtc_vllm.evaluation.processes.suite import describe_documents
from kvtc_vllm.evaluation.tasks import CHATS, DATA_TASKS, Session, open_task
from tests.evaluation.public_data import write_public_data

CONTEXT = 1400
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ONE_QUESTION = ["kv-retrieval", "essay-needle", "open-questions"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_public_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer(reference_model: Path) -> Any:
    found = AutoTokenizer.from_pretrained(reference_model)
    found.chat_template = TEMPLATE
    return found


def sessions(data: Path, tokenizer: Any, name: str, seed: int = 3) -> list[Session]:
    return open_task(name, Source(str(data), "report")).sessions(tokenizer, CONTEXT, 4, seed)


@pytest.mark.parametrize("name", DATA_TASKS)
def test_sessions_repeat_fit_and_keep_to_their_part(data: Path, tokenizer: Any, name: str) -> None:
    found = sessions(data, tokenizer, name)
    assert found == sessions(data, tokenizer, name)
    assert found != sessions(data, tokenizer, name, seed=4)
    assert len(found) == 4
    for session in found:
        assert session.documents
        assert all(int(document.split()[-1]) % 4 == 3 for document in session.documents)
        last = session.turns[-1]
        assert 0.6 * CONTEXT < len(last.prompt) <= CONTEXT
        assert last.target


@pytest.mark.parametrize("name", ONE_QUESTION)
def test_answers_are_in_the_prompt_but_in_no_example(data: Path, tokenizer: Any, name: str) -> None:
    for session in sessions(data, tokenizer, name):
        (example,) = session.turns
        prompt = tokenizer.decode(example.prompt)
        answer = tokenizer.decode(example.target).strip()
        assert prompt.count(answer) == 1
        assert prompt.rindex("<assistant>") > prompt.rindex("<user>")


def test_variables_have_their_number_at_their_depth(data: Path, tokenizer: Any) -> None:
    for session in sessions(data, tokenizer, "essay-variables"):
        (example,) = session.turns
        prompt = tokenizer.decode(example.prompt)
        text = prompt.split("<user>")[-1]
        name = prompt.split("<assistant>")[-1].removesuffix(" =")
        assigned = re.findall(r"(\w+) = (\d{4})\.", text)
        assert len(assigned) == len(dict(assigned)) == 4
        number = int(4 * float(example.label.split()[1]))
        assert assigned[number] == (name, tokenizer.decode(example.target).strip())


@pytest.mark.parametrize("name", sorted(CHATS & DATA_TASKS.keys()))
def test_chats_grow_turn_by_turn_and_recall(data: Path, tokenizer: Any, name: str) -> None:
    for session in sessions(data, tokenizer, name):
        assert len(session.turns) >= 2
        for before, after in itertools.pairwise(session.turns):
            assert after.prompt[: len(before.prompt)] == before.prompt
        for turn in session.turns:
            answer = tokenizer.decode(turn.target).strip()
            assert answer in tokenizer.decode(turn.prompt).split("Read this text.")[0]


def test_without_a_template_prompts_are_paragraphs(
    data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    for name in [*ONE_QUESTION, *CHATS & DATA_TASKS.keys()]:
        for session in sessions(data, tokenizer, name):
            assert "<user>" not in tokenizer.decode(session.turns[-1].prompt)


def test_parts_are_disjoint_and_complete(data: Path) -> None:
    found = [{d.name for d in Source(str(data), part).documents("essays")} for part in PARTS]
    assert sum(map(len, found)) == len(set.union(*found)) == 24
    library = [{d.name for d in Source(str(data), part).documents("library")} for part in PARTS]
    assert sum(map(len, library)) == len(set.union(*library)) > 100


def test_documents_are_told_by_number() -> None:
    text = describe_documents(Source("x", "tune"), ["essays 10", "essays 2", "gsm8k-test 6"])
    assert text.startswith("part tune;")
    assert text.endswith("essays 2, 10; gsm8k-test 6")


def test_data_that_is_missing_or_wrong_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no essays\.jsonl\.gz: JSON lines with text, from"):
        Source(str(tmp_path), "tune").documents("essays")
    with pytest.raises(DataError, match="give --data DIR"):
        open_task("essays")
    (tmp_path / "gsm8k-test.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(DataError, match="line 1 has no answer"):
        Source(str(tmp_path), "tune").documents("gsm8k-test")
    (tmp_path / "essays.jsonl.gz").write_text("plain")
    with pytest.raises(DataError, match="can't be read"):
        Source(str(tmp_path), "tune").documents("essays")
