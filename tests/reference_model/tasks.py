"""Generated tasks: recall, tracking, copying, counting and arithmetic in plain text.

Each generator returns one document as segments `(text, weight)`. The weight is
that of the segment's tokens in the training loss: names and numbers drawn at
random cannot be predicted, so they count little, and the answers count fully.

Answers repeat the key before the value ("amber falcon: 4821"), which makes each
of them an in-context copy, the ability that these tasks exist to teach.

`Task.example` cuts a document into prompt and answer for evaluation.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import corpus
import words
from corpus import Split

#: Loss weight of text that the model can only guess.
CONTEXT_WEIGHT = 0.1

#: What the assistant says to a text without a question.
READ = "I have read the text."

USER, ASSISTANT, SYSTEM, END = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"


@dataclass
class Task:
    """One document: a context, then questions with their answers.

    `answers` holds (question, answer) pairs, whose texts follow the context directly.
    """

    context: str
    answers: list[tuple[str, str]] = field(default_factory=list)

    def segments(self) -> list[tuple[str, float]]:
        """The whole document with loss weights, for training."""
        pieces = [(self.context, CONTEXT_WEIGHT)]
        for question, answer in self.answers:
            pieces += [(question, CONTEXT_WEIGHT), (answer, 1.0)]
        return pieces

    def text(self) -> str:
        """The whole document as one string."""
        return "".join(piece for piece, _ in self.segments())

    def example(self) -> tuple[str, str]:
        """The prompt up to the first question, and its expected answer."""
        question, answer = self.answers[0]
        return self.context + question, answer


def seeded(split: Split, seed: int | str, label: str) -> random.Random:
    """A generator whose stream is disjoint for the two splits and for each label."""
    return random.Random(f"{split}/{label}/{seed}")


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def _names(rng: random.Random, count: int) -> list[str]:
    """Distinct names: single nouns where enough, else adjective and noun."""
    if count <= 60 and rng.random() < 0.5:
        return rng.sample(words.NOUNS, count)
    pairs: dict[str, None] = {}
    while len(pairs) < count:
        pairs[f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.NOUNS)}"] = None
    return list(pairs)


def kv_retrieval(rng: random.Random, split: Split, pairs: int, questions: int = 0) -> Task:
    """A table of names and numbers, then look-ups in it (after "Lost in the Middle")."""
    names = _names(rng, pairs)
    values = [_digits(rng, 4) for _ in names]
    table = "".join(f"- {name}: {value}\n" for name, value in zip(names, values, strict=True))
    task = Task(f"Here is a table of names and numbers.\n{table}")
    asked = rng.sample(range(pairs), min(questions or pairs, pairs))
    for i in asked:
        task.answers.append(
            (f"What is the number of {names[i]}?\n- {names[i]}:", f" {values[i]}\n")
        )
    return task


def variable_tracking(
    rng: random.Random, split: Split, chains: int, hops: int, questions: int = 0
) -> Task:
    """Chains of assignments; the answer spells the chain down to its number (after RULER)."""
    variables = rng.sample(words.NOUNS, chains * (hops + 1))
    lines: list[list[str]] = []
    chain_texts: list[str] = []
    for c in range(chains):
        own = variables[c * (hops + 1) : (c + 1) * (hops + 1)]
        value = _digits(rng, 4)
        lines.append(
            [f"VAR {own[0]} = {value}\n"] + [f"VAR {new} = {old}\n" for old, new in pairwise(own)]
        )
        chain_texts.append(" = ".join([*reversed(own), value]))
    # Interleave the chains, keeping each one's own order.
    order = [c for c in range(chains) for _ in range(hops + 1)]
    rng.shuffle(order)
    position = [0] * chains
    context = "Follow the assignments.\n"
    for c in order:
        context += lines[c][position[c]]
        position[c] += 1
    task = Task(context)
    for c in rng.sample(range(chains), min(questions or chains, chains)):
        task.answers.append(
            (
                f"What is the value of {chain_texts[c].split(' = ')[0]}?\nAnswer:",
                f" {chain_texts[c]}\n",
            )
        )
    return task


def filler(rng: random.Random, split: Split, characters: int) -> list[str]:
    """Prose paragraphs of about `characters` characters in all."""
    pool = corpus.paragraphs(split)
    chosen: list[str] = []
    total = 0
    while total < characters:
        chosen.append(rng.choice(pool))
        total += len(chosen[-1])
    return chosen


def needle(rng: random.Random, split: Split, characters: int, needles: int = 1) -> Task:
    """Secret numbers of cities hidden in prose, then asked for."""
    parts = filler(rng, split, characters)
    cities = rng.sample(words.CITIES, needles)
    facts = [f"The secret number of {city} is {_digits(rng, 5)}." for city in cities]
    for fact in facts:
        parts.insert(rng.randrange(len(parts) + 1), fact)
    task = Task("\n".join(parts) + "\n")
    for i in rng.sample(range(needles), needles):
        task.answers.append(
            (f"What is the secret number of {cities[i]}?\nAnswer:", f" {facts[i]}\n")
        )
    return task


def copying(rng: random.Random, split: Split, length: int) -> Task:
    """A random list and its copy, sometimes more than once."""
    kind = rng.random()
    if kind < 0.4:
        items = [rng.choice(words.NOUNS) for _ in range(length)]
    elif kind < 0.7:
        items = [_digits(rng, rng.randint(2, 5)) for _ in range(length)]
    else:
        items = [rng.choice(words.ADJECTIVES + words.CITIES + words.PEOPLE) for _ in range(length)]
    line = " " + " ".join(items) + "\n"
    task = Task("List:" + line)
    task.answers = [("Copy:", line)] * rng.randint(1, 2)
    return task


def word_count(rng: random.Random, split: Split, distinct: int) -> Task:
    """Words repeated in random order; how often does each occur?"""
    chosen = rng.sample(words.NOUNS, distinct)
    counts = [rng.randint(1, 6) for _ in chosen]
    bag = [word for word, count in zip(chosen, counts, strict=True) for _ in range(count)]
    rng.shuffle(bag)
    task = Task("Words: " + " ".join(bag) + "\n")
    for word, count in zip(chosen, counts, strict=True):
        task.answers.append((f"How often is {word} there?\nAnswer:", f" {word}: {count}\n"))
    return task


def arithmetic(rng: random.Random, split: Split, digits: int) -> Task:
    """A few sums and differences."""
    task = Task("Arithmetic.\n")
    for _ in range(6):
        a, b = rng.randrange(10**digits), rng.randrange(10**digits)
        if rng.random() < 0.5:
            task.answers.append((f"{a} + {b} =", f" {a + b}\n"))
        else:
            task.answers.append((f"{max(a, b)} - {min(a, b)} =", f" {abs(a - b)}\n"))
    return task


def chat_text(turns: list[tuple[str, str]], system: str | None = None) -> Task:
    """A chat in the template's format; the assistant's words are the answers."""
    head = f"{SYSTEM}{system}{END}" if system else ""
    task = Task(head)
    for user, assistant in turns:
        task.answers.append((f"{USER}{user}{END}{ASSISTANT}", f"{assistant}{END}"))
    return task


@dataclass(frozen=True)
class Fact:
    """Something a chat states and later asks: as stated, as asked, as answered."""

    stated: str
    question: str
    answer: str


def personal_facts(rng: random.Random, count: int) -> list[Fact]:
    """Facts about the user; at most one of each sort."""
    animal, pet = rng.choice(words.ANIMALS), rng.choice(words.PEOPLE)
    city, colour = rng.choice(words.CITIES), rng.choice(words.COLOURS)
    food, job, name = rng.choice(words.FOODS), rng.choice(words.JOBS), rng.choice(words.PEOPLE)
    number = _digits(rng, 4)
    facts = [
        Fact(
            f"My {animal} is called {pet}.",
            f"What is my {animal} called?",
            f"Your {animal} is called {pet}.",
        ),
        Fact(f"I live in {city}.", "Where do I live?", f"You live in {city}."),
        Fact(
            f"My favourite colour is {colour}.",
            "What is my favourite colour?",
            f"Your favourite colour is {colour}.",
        ),
        Fact(
            f"My favourite food is {food}.",
            "What is my favourite food?",
            f"Your favourite food is {food}.",
        ),
        Fact(f"I work as a {job}.", "What is my job?", f"You work as a {job}."),
        Fact(f"My name is {name}.", "What is my name?", f"Your name is {name}."),
        Fact(
            f"My locker number is {number}.",
            "What is my locker number?",
            f"Your locker number is {number}.",
        ),
    ]
    return rng.sample(facts, min(count, len(facts)))


def place_facts(rng: random.Random, count: int) -> list[Fact]:
    """Facts for passages: codes of places and the people who run them."""
    facts = []
    for place in rng.sample(words.PLACES, min(count, len(words.PLACES))):
        if rng.random() < 0.6:
            said = f"the code of the {place} is {_digits(rng, 4)}."
            facts.append(Fact("T" + said[1:], f"What is the code of the {place}?", "T" + said[1:]))
        else:
            said = f"The owner of the {place} is {rng.choice(words.PEOPLE)}."
            facts.append(Fact(said, f"Who is the owner of the {place}?", said))
    return facts


def passage(rng: random.Random, split: Split, characters: int, facts: list[Fact]) -> str:
    """Prose with facts strewn into it."""
    parts = filler(rng, split, characters)
    for fact in facts:
        parts.insert(rng.randrange(len(parts) + 1), fact.stated)
    return "\n".join(parts)


def chat(rng: random.Random, split: Split, characters: int) -> Task:
    """A chat of several turns that states facts, adds text, and recalls the facts later."""
    known: list[Fact] = []
    turns: list[tuple[str, str]] = []
    if characters >= 300 and rng.random() < 0.7:
        facts = place_facts(rng, rng.randint(1, 5))
        turns.append((f"Read this text.\n{passage(rng, split, characters, facts)}", READ))
        known += facts
    else:
        for fact in personal_facts(rng, rng.randint(1, 4)):
            turns.append((fact.stated, f"I will remember. {fact.answer}"))
            known.append(fact)
    for fact in rng.sample(known, len(known)):
        if rng.random() < 0.25:
            more = place_facts(rng, 1)
            fresh = [f for f in more if all(f.question != k.question for k in known)]
            text = passage(rng, split, min(characters, 400), fresh)
            turns.append((f"Here is more text.\n{text}", READ))
            known += fresh
            turns += [(f.question, f.answer) for f in fresh]
        turns.append((fact.question, fact.answer))
    return chat_text(turns, "You are a helpful assistant." if rng.random() < 0.2 else None)


def sample_task(rng: random.Random, split: Split, difficulty: float, tokens: int = 512) -> Task:
    """One task of a mixed bag; `difficulty` in 0..1 and the room in tokens set its size."""
    room = tokens / 512

    def upto(low: int, high: float) -> int:
        return rng.randint(low, max(low, round(low + (high - low) * difficulty)))

    makers: list[tuple[float, Callable[[], Task]]] = [
        (0.26, lambda: kv_retrieval(rng, split, upto(3, 24 * room), questions=12)),
        (0.16, lambda: variable_tracking(rng, split, upto(1, 6), upto(1, 3))),
        (0.16, lambda: needle(rng, split, upto(150, 1500 * room), rng.randint(1, 4))),
        (0.24, lambda: chat(rng, split, upto(100, 1300 * room))),
        (0.10, lambda: copying(rng, split, upto(4, 30))),
        (0.04, lambda: word_count(rng, split, upto(2, 6))),
        (0.04, lambda: arithmetic(rng, split, upto(1, 3))),
    ]
    make = rng.choices([m for _, m in makers], weights=[w for w, _ in makers])[0]
    return make()
