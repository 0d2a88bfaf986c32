"""Tasks by name. One file per task or family, one row here."""

from __future__ import annotations

from kvtc_vllm.evaluation.data.public import DataError, Source
from kvtc_vllm.evaluation.tasks.base import Example, Session, Task, Tokenizer
from kvtc_vllm.evaluation.tasks.common_words import CommonWords
from kvtc_vllm.evaluation.tasks.dialogue import DataTask
from kvtc_vllm.evaluation.tasks.essay_chats import EssayChats, EssayLongChats
from kvtc_vllm.evaluation.tasks.essay_needle import EssayNeedle
from kvtc_vllm.evaluation.tasks.essay_variables import EssayVariables
from kvtc_vllm.evaluation.tasks.kv_retrieval import KeyValueRetrieval
from kvtc_vllm.evaluation.tasks.language import Code, Prose
from kvtc_vllm.evaluation.tasks.lost_in_the_middle import LostInTheMiddle
from kvtc_vllm.evaluation.tasks.multi_turn import MultiTurn
from kvtc_vllm.evaluation.tasks.needle import Needle
from kvtc_vllm.evaluation.tasks.open_questions import OpenQuestions
from kvtc_vllm.evaluation.tasks.public_text import Essays, Library, Maths
from kvtc_vllm.evaluation.tasks.variable_tracking import VariableTracking

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (Prose, Code, LostInTheMiddle, VariableTracking, Needle, CommonWords, MultiTurn)
}
"""Generated, and text of the Python installation. The reference model is trained for these."""

DATA_TASKS: dict[str, type[DataTask]] = {
    task.name: task
    for task in (
        Essays,
        Library,
        Maths,
        KeyValueRetrieval,
        EssayNeedle,
        EssayVariables,
        OpenQuestions,
        EssayChats,
        EssayLongChats,
    )
}
"""Over public documents, through the model's chat template if it has one."""

CHATS = frozenset({MultiTurn.name, EssayChats.name, EssayLongChats.name})
"""Tasks with several prompts per session."""


def open_task(name: str, source: Source | None = None) -> Task:
    """The task of this name. Raises DataError if it needs a source and none is given.

    name: in `TASKS` or `DATA_TASKS`.
    """
    if name in TASKS:
        return TASKS[name]()
    if source is None:
        raise DataError(f"task {name!r} reads public documents: give --data DIR")
    return DATA_TASKS[name](source)


__all__ = [
    "CHATS",
    "DATA_TASKS",
    "TASKS",
    "DataError",
    "Example",
    "Session",
    "Source",
    "Task",
    "Tokenizer",
    "open_task",
]
