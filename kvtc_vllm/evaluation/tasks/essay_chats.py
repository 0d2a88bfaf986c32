"""Chats over essays that recall what the user said; every turn's prefix is reloaded."""

from __future__ import annotations

import random
from typing import ClassVar

from kvtc_vllm.evaluation.data.generators import Fact, personal_facts, place_facts, seeded
from kvtc_vllm.evaluation.tasks.base import Example, Session, Tokenizer
from kvtc_vllm.evaluation.tasks.dialogue import DataTask, Message, chat_text, encode_chat
from kvtc_vllm.evaluation.tasks.essay_text import essay_sentences

FIRST_CHARACTERS = 1600
"""Of essay text in the first message."""


class EssayChats(DataTask):
    """The first message has facts about the user and a piece of an essay. Each later one
    brings more of the essay and asks for a fact.

    The answers of the history are the expected ones, so turns stay comparable. A chat is
    cut where its next prompt would pass the context.
    """

    name = "essay-chats"
    description = "recall in chats of up to five answers over essays, by turn"
    later_characters: ClassVar[int] = 500
    """Of essay text in each later message."""

    def facts(self, rng: random.Random) -> list[Fact]:
        """What a chat states at first, in the order in which it is asked for."""
        return personal_facts(rng, 5)

    def sessions(self, tokenizer: Tokenizer, context: int, count: int, seed: int) -> list[Session]:
        documents = self.shuffled("essays", seed)
        sessions = []
        for number in range(count):
            first = number % len(documents)
            facts = self.facts(seeded("eval", f"{seed}-{number}", self.name))
            characters = FIRST_CHARACTERS + len(facts) * self.later_characters
            sentences, used = essay_sentences(documents[first:] + documents[:first], characters)
            text = " ".join(sentences)
            stated = " ".join(fact.stated for fact in facts)
            messages: list[Message] = [
                ("user", f"{stated}\n\nRead this text.\n\n{text[:FIRST_CHARACTERS]}"),
                ("assistant", "I have read the text."),
            ]
            known = ""
            ids: list[int] = []
            turns: list[Example] = []
            for turn, fact in enumerate(facts):
                at = FIRST_CHARACTERS + turn * self.later_characters
                piece = text[at : at + self.later_characters]
                asked = ("user", f"It goes on.\n\n{piece}\n\n{fact.question}")
                begun, _, answer = fact.answer.removesuffix(".").rpartition(" ")
                whole = chat_text(tokenizer, [*messages, asked]) + begun
                if not whole.startswith(known):
                    raise ValueError(f"{self.name}: the chat template changes earlier turns")
                new = whole.removeprefix(known)
                ids = [
                    *ids,
                    *(
                        tokenizer.encode(new, add_special_tokens=False)
                        if known
                        else encode_chat(tokenizer, new)
                    ),
                ]
                if len(ids) > context:
                    break
                target = tokenizer.encode(f" {answer}", add_special_tokens=False)
                turns.append(Example(ids, target, is_answer=True, label=f"turn {turn + 1:02d}"))
                ids = [*ids, *target]
                known = f"{whole} {answer}"
                messages += [asked, ("assistant", f"{begun} {answer}.")]
            if len(turns) < 2:
                raise ValueError(f"{self.name}: a context of {context} tokens holds no second turn")
            sessions.append(Session(turns, used))
        return sessions


class EssayLongChats(EssayChats):
    """Ten answers with less text between them: a turn stores about one chunk, computed after a
    prefix that was reloaded turn by turn, so errors that add up show by turn.
    """

    name = "essay-long-chats"
    description = "recall in chats of up to ten answers over essays, by turn"
    later_characters = 300

    def facts(self, rng: random.Random) -> list[Fact]:
        """Five about the user and five about places, mixed."""
        mixed = [*personal_facts(rng, 5), *place_facts(rng, 5)]
        rng.shuffle(mixed)
        return mixed
