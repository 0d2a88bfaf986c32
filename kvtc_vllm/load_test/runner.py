"""Clients at work: conversations in turn order, on one server or on two in alternation.

With two servers every turn is asked of both, one after the other, and which comes first changes
from turn to turn. Both get the same messages: the answers in them are the first server's. So the
prompts are equal, and so must be the answers of servers that compute the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvtc_vllm.load_test.client import Answer, Messages, Server
from kvtc_vllm.load_test.conversation import Conversation


@dataclass(frozen=True)
class Request:
    """One turn, asked. answers: one per server, in the order of the servers."""

    conversation: int
    turn: int
    answers: tuple[Answer, ...]


async def run(
    servers: Sequence[Server],
    conversations: Sequence[Conversation],
    clients: int,
    done: Callable[[Request], None] = lambda request: None,
) -> list[Request]:
    """Hold all conversations with at most `clients` at once; returns turns as they ended.

    A conversation ends early when a server fails to answer. done: called after every turn.
    """
    waiting = iter(enumerate(conversations))
    found: list[Request] = []
    began = time.perf_counter()

    def take(request: Request) -> None:
        found.append(request)
        done(request)

    await asyncio.gather(
        *(_client(servers, waiting, began, take) for _ in range(min(clients, len(conversations))))
    )
    return found


async def _client(
    servers: Sequence[Server],
    waiting: Iterator[tuple[int, Conversation]],
    began: float,
    take: Callable[[Request], None],
) -> None:
    for number, conversation in waiting:
        if conversation.start_seconds is not None:
            await asyncio.sleep(began + conversation.start_seconds - time.perf_counter())
        await _converse(servers, number, conversation, take)


async def _converse(
    servers: Sequence[Server],
    number: int,
    conversation: Conversation,
    take: Callable[[Request], None],
) -> None:
    messages: Messages = []
    if conversation.system:
        messages.append({"role": "system", "content": conversation.system})
    for index, turn in enumerate(conversation.turns):
        await asyncio.sleep(turn.think_seconds)
        messages.append({"role": "user", "content": turn.text})
        answers: dict[int, Answer] = {}
        places = range(len(servers))
        for place in reversed(places) if (number + index) % 2 else places:
            answers[place] = await servers[place].ask(messages, turn.output_tokens)
        request = Request(number, index, tuple(answers[place] for place in places))
        take(request)
        if any(answer.error for answer in request.answers):
            return
        messages.append({"role": "assistant", "content": request.answers[0].text})
