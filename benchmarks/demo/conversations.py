"""Holds the conversations against one server and counts where their prompts came from."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import msgspec
from tqdm import tqdm

from benchmarks.demo.server import Server

MAX_ANSWER_TOKENS = 32
RESIDENT_SHARE = 0.9
"""A conversation counts as resident if its last return found this share of what it could."""

_COUNTED_BYTES = 2
"""Of an element of uncompressed KV, in ratios."""

Chats = list[list[str]]
Answers = list[list[str]]


@dataclass
class Turn:
    """One request. reloaded, cached: prompt tokens from our tier and from vLLM's own cache."""

    chat: int
    prompt_tokens: int
    reloaded: int
    cached: int
    ttft: float


class RunReport(msgspec.Struct, kw_only=True):
    """One row of the report.

    computed_tokens: of the prompts, by prefill. reloaded_tokens: from the tier.
    stored_bytes: held by the tier at the end, every header and sink counted;
    raw_bytes: the same KV uncompressed, at 16 bits an element; ratio is their quotient.
    budget_bytes: what the tier may hold. dropped_stores: chunks that were to be stored and were
    not. conversations_resident: how many last turns found their past in the tier (see
    RESIDENT_SHARE). conversations_fit: how many of their mean size the budget holds at this
    ratio. TTFT is of returns: in a first turn there is nothing to reload.
    answers_equal_fraction: answers that are those of the reference run to the last character.
    words_equal_fraction: of its words, those before the first difference of their answer.
    """

    prompt_tokens: int
    computed_tokens: int
    reloaded_tokens: int
    raw_bytes: int
    stored_bytes: int
    ratio: float
    budget_bytes: int
    conversations_resident: int
    conversations_fit: int
    ttft_mean_s: float
    ttft_p95_s: float
    answers_equal_fraction: float
    words_equal_fraction: float
    dropped_stores: int


@dataclass
class Run:
    """Everything observed with one configuration."""

    turns: list[Turn] = field(default_factory=list)
    answers: Answers = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


def hold(
    server: Server, chats: Chats, history: Answers | None, label: str, system: str | None = None
) -> Run:
    """Ask all conversations turn by turn, round-robin.

    A question is asked when what was to be stored of the last one is stored, as if its reader
    had taken some time. history: answers to put into the prompts instead of this run's own, so
    that every run sees the same prompts. system: first message of every conversation.
    """
    run = Run(answers=[[] for _ in chats])
    # The first request pays for start-up work; too short to be stored.
    server.ask([{"role": "user", "content": "Hello."}], MAX_ANSWER_TOKENS)
    before = server.settle()
    turns = len(chats[0])
    with tqdm(total=turns * len(chats), desc=label) as bar:
        for turn in range(turns):
            for number, chat in enumerate(chats):
                past = (history or run.answers)[number]
                answer = server.ask(messages(chat, past, turn, system), MAX_ANSWER_TOKENS)
                after = server.settle()
                run.answers[number].append(answer.text)
                run.turns.append(
                    Turn(
                        number,
                        answer.prompt_tokens,
                        _grown(before, after, "vllm:external_prefix_cache_hits"),
                        _grown(before, after, "vllm:prefix_cache_hits"),
                        answer.ttft,
                    )
                )
                before = after
                bar.update()
    run.metrics = before
    return run


def summarise(
    run: Run,
    reference: Answers,
    chats: int,
    window: int,
    chunk_tokens: int,
    budget: int,
    element_bytes: int = _COUNTED_BYTES,
) -> RunReport:
    """Figures of one run, checked against our own counters.

    element_bytes: of an element of the paged cache.

    Raises RuntimeError if vLLM and the connector disagree on what was reloaded, or if
    the tier outgrew its budget.
    """
    prompt = sum(turn.prompt_tokens for turn in run.turns)
    reloaded = sum(turn.reloaded for turn in run.turns)
    cached = sum(turn.cached for turn in run.turns)
    ours = round(run.metrics.get("vllm:kvtc_hit_tokens", 0))
    loaded = round(run.metrics.get("vllm:kvtc_loaded_tokens", 0))
    if not reloaded == ours == loaded:
        raise RuntimeError(
            f"vLLM counted {reloaded} reloaded tokens, the connector {ours} offered "
            f"and {loaded} loaded"
        )
    held = round(run.metrics.get("vllm:kvtc_tier_used_bytes", 0))
    if held > budget:
        raise RuntimeError(f"the tier holds {held} bytes, its budget is {budget}")
    chunks = run.metrics.get("vllm:kvtc_stored_chunks", 0)
    chunk_bytes = run.metrics.get("vllm:kvtc_stored_raw_bytes", 0) / chunks if chunks else 0.0
    chunk_bytes *= _COUNTED_BYTES / element_bytes
    raw = round(run.metrics.get("vllm:kvtc_tier_chunks", 0) * chunk_bytes)
    ratio = raw / held if held else 0.0
    final_tokens = statistics.fmean(turn.prompt_tokens for turn in run.turns[-chats:])
    size = final_tokens * chunk_bytes / chunk_tokens / ratio if ratio else 0.0
    later = sorted(turn.ttft for turn in run.turns[chats:])
    pairs = [
        pair
        for mine, other in zip(run.answers, reference, strict=True)
        for pair in zip(mine, other, strict=True)
    ]
    words = sum(len(theirs.split()) for _, theirs in pairs)
    return RunReport(
        prompt_tokens=prompt,
        computed_tokens=prompt - reloaded - cached,
        reloaded_tokens=reloaded,
        raw_bytes=raw,
        stored_bytes=held,
        ratio=ratio,
        budget_bytes=budget if chunks else 0,
        conversations_fit=int(budget / size) if size else 0,
        conversations_resident=_resident(run.turns[-chats:], window, chunk_tokens),
        ttft_mean_s=statistics.fmean(later),
        ttft_p95_s=later[min(len(later) - 1, int(0.95 * len(later)))],
        answers_equal_fraction=sum(ours == theirs for ours, theirs in pairs) / len(pairs),
        words_equal_fraction=sum(_words_equal(*pair) for pair in pairs) / max(1, words),
        dropped_stores=round(run.metrics.get("vllm:kvtc_dropped_stores", 0)),
    )


def _words_equal(ours: str, theirs: str) -> int:
    """Words before the first difference."""
    count = 0
    for our_word, their_word in zip(ours.split(), theirs.split(), strict=False):
        if our_word != their_word:
            break
        count += 1
    return count


def _resident(last: list[Turn], window: int, chunk_tokens: int) -> int:
    """How many of the last returns found their prefix in the tier.

    What a return can find at most: whole chunks of the previous turn outside the recent
    window. The previous turn's length is not known here, so one chunk is allowed for it.
    """
    found = 0
    for turn in last:
        possible = turn.prompt_tokens - window - 2 * chunk_tokens
        found += turn.reloaded >= RESIDENT_SHARE * max(1, possible)
    return found


def _grown(before: dict[str, float], after: dict[str, float], name: str) -> int:
    return round(after.get(name, 0.0) - before.get(name, 0.0))


def messages(
    chat: list[str], answers: list[str], turn: int, system: str | None
) -> list[dict[str, str]]:
    """What is sent for a turn: everything said before it, and its question."""
    sent = [] if system is None else [{"role": "system", "content": system}]
    for i in range(turn):
        sent.append({"role": "user", "content": chat[i]})
        sent.append({"role": "assistant", "content": answers[i]})
    sent.append({"role": "user", "content": chat[turn]})
    return sent
