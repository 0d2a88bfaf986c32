"""Tasks by name. One file per task or family, one row here."""

from __future__ import annotations

from kvtc_vllm.evaluation.tasks.base import Example, Session, Task, Tokenizer
from kvtc_vllm.evaluation.tasks.common_words import CommonWords
from kvtc_vllm.evaluation.tasks.language import Code, Prose
from kvtc_vllm.evaluation.tasks.lost_in_the_middle import LostInTheMiddle
from kvtc_vllm.evaluation.tasks.multi_turn import MultiTurn
from kvtc_vllm.evaluation.tasks.needle import Needle
from kvtc_vllm.evaluation.tasks.variable_tracking import VariableTracking

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (Prose, Code, LostInTheMiddle, VariableTracking, Needle, CommonWords, MultiTurn)
}

__all__ = ["TASKS", "Example", "Session", "Task", "Tokenizer"]
