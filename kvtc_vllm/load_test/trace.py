"""Conversations from a JSONL file, in the forms that `vllm bench serve` and guidellm read.

A line is one of

    {"timestamp": 0.5, "input_length": 800, "output_length": 60, "hash_ids": [0, 1, 2]}
    {"prompt": "...", "output_tokens": 60}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}, ...]}
    {"messages": [{"role": "user", "content": "..."}, ...]}

The first is vLLM's timed trace, and Mooncake's: equal hash ids are equal blocks of the prompt.
The others may have a `timestamp`, too. Of a conversation the user's turns and the system message
are taken; answers are the server's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtc_vllm.load_test.conversation import Conversation, Turn
from kvtc_vllm.load_test.errors import LoadTestError
from kvtc_vllm.load_test.words import text

_OUTPUT_NAMES = ("output_length", "output_tokens", "output_tokens_count")
_USERS = ("user", "human")


@dataclass(frozen=True)
class TraceForm:
    """How to read a trace.

    block_tokens: tokens behind one hash id. seconds: of one unit of `timestamp`. output_tokens:
    most tokens of an answer where a line does not say. think_seconds: before every later turn.
    """

    block_tokens: int = 16
    seconds: float = 1.0
    output_tokens: int = 64
    think_seconds: float = 0.0


def read_trace(path: Path, form: TraceForm) -> list[Conversation]:
    """One conversation per line, by time. Raises LoadTestError with the number of a bad line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LoadTestError(f"{path}: cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(_conversation(json.loads(line), form))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LoadTestError(f"{path}, line {number}: {_reason(error)}") from error
    if not found:
        raise LoadTestError(f"{path}: has no lines, one request or conversation per line is right")
    return sorted(found, key=lambda one: one.start_seconds or 0.0)


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return str(error)


def _conversation(entry: dict[str, Any], form: TraceForm) -> Conversation:
    start = entry.get("timestamp")
    seconds = None if start is None else float(start) * form.seconds
    output = next((int(entry[name]) for name in _OUTPUT_NAMES if name in entry), form.output_tokens)
    if output < 1:
        raise ValueError(f"the length of the answer is {output}, 1 or more is right")
    if "hash_ids" in entry:
        prompt = _blocks(entry["hash_ids"], int(entry["input_length"]), form.block_tokens)
        return Conversation((Turn(prompt, output),), start_seconds=seconds)
    if "prompt" in entry:
        return Conversation((Turn(_text(entry["prompt"]), output),), start_seconds=seconds)
    said = [_message(one) for one in entry.get("conversations") or entry.get("messages") or ()]
    asked = [content for role, content in said if role in _USERS]
    if not asked:
        raise ValueError("is none of hash_ids, prompt, conversations and messages with a user")
    turns = [Turn(words, output, form.think_seconds if i else 0.0) for i, words in enumerate(asked)]
    system = next((content for role, content in said if role == "system"), "")
    return Conversation(tuple(turns), system, seconds)


def _message(one: dict[str, Any]) -> tuple[str, str]:
    role = one["from"] if "from" in one else one["role"]
    return str(role), _text(one["value"] if "value" in one else one["content"])


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"holds {type(value).__name__} where text is right")
    return value


def _blocks(hash_ids: list[int], tokens: int, block_tokens: int) -> str:
    """A prompt of about `tokens` tokens; equal ids in equal places are equal text."""
    if tokens < 1:
        raise ValueError(f"input_length is {tokens}, 1 or more is right")
    words = [
        text(min(block_tokens, tokens - place * block_tokens), "block", block)
        for place, block in enumerate(hash_ids)
        if place * block_tokens < tokens
    ]
    # vLLM's replay ends where the ids end, so this does.
    return " ".join(words)
