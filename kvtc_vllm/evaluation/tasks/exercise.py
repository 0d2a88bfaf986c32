"""Tasks that are one generated exercise per session, as large as the context allows."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from kvtc_vllm.evaluation.data.generators import Exercise, seeded
from kvtc_vllm.evaluation.tasks.base import Example, Session, Task, Tokenizer, encode_prompt


class ExerciseTask(Task):
    """Sessions take the depths in turn; their results are told apart by the label of the depth."""

    depths: ClassVar[Sequence[float]] = (0.0,)
    """Where in the context what is asked for lies, or another degree of difficulty."""
    label: ClassVar[str] = "depth {:g}"
    first_size: ClassVar[int]
    """Size to begin with in the search for the largest exercise."""

    @abstractmethod
    def exercise(self, rng: random.Random, size: int, depth: float) -> Exercise:
        """An exercise whose prompt grows with `size` (characters, pairs, ...)."""

    def sessions(self, tokenizer: Tokenizer, context: int, count: int, seed: int) -> list[Session]:
        sessions = []
        for number in range(count):
            depth = self.depths[number % len(self.depths)]

            def make(size: int, number: int = number, depth: float = depth) -> Exercise:
                return self.exercise(seeded("eval", f"{seed}-{number}", self.name), size, depth)

            prompt, answer = largest_fitting(make, tokenizer, context, self.first_size)
            example = Example(
                prompt=encode_prompt(tokenizer, prompt),
                target=tokenizer.encode(answer, add_special_tokens=False),
                is_answer=True,
                label=self.label.format(depth),
            )
            sessions.append(Session([example]))
        return sessions


def largest_fitting(
    make: Callable[[int], Exercise], tokenizer: Tokenizer, context: int, size: int
) -> tuple[str, str]:
    """Prompt and answer of the largest exercise whose prompt is at most `context` tokens.

    make: an exercise of a given size (characters, pairs, ...), growing with it; size:
    where to begin. Raises ValueError if even the smallest is too long.
    """

    def tokens(candidate: int) -> int:
        return len(encode_prompt(tokenizer, make(candidate).example()[0]))

    return make(largest_size(tokens, context, size)).example()


def largest_size(tokens: Callable[[int], int], context: int, size: int) -> int:
    """Largest size, to a 64th, of which there are at most `context` tokens.

    tokens: number of tokens at a size, growing with it. size: where to begin. Raises
    ValueError if size 1 is too long already.
    """
    low, high = 0, size
    while tokens(high) <= context:
        low, high = high, 2 * high
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        if tokens(middle) <= context:
            low = middle
        else:
            high = middle
    if low == 0:
        raise ValueError(f"no exercise fits {context} tokens")
    return low
