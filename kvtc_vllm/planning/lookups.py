"""Which tokens of a prompt a cache could serve: the rules of vLLM and of the connector."""

from __future__ import annotations

from dataclasses import dataclass

from kvtc_vllm.load_test.traffic import Traffic


@dataclass(frozen=True)
class Rules:
    """chunk_tokens: what is stored together. recent_window: last tokens of a prompt, never loaded.

    template_tokens: what a chat template adds per message; it belongs to the message.
    """

    chunk_tokens: int = 128
    recent_window: int = 128
    template_tokens: int = 0

    def reusable(self, shared: int, prompt: int) -> int:
        """Tokens of a prompt that may be loaded, if its first `shared` tokens were stored."""
        whole = shared // self.chunk_tokens * self.chunk_tokens
        return max(0, min(whole, prompt - self.recent_window))


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens of all turns of a conversation, template included.

    prefix: of the system message. document: up to its end, prefix included. prompts: of each turn.
    stored: prompt and answer of each turn.
    """

    prefix: int
    document: int
    prompts: tuple[int, ...]
    stored: tuple[int, ...]


def lengths(traffic: Traffic, rules: Rules) -> Lengths:
    """All conversations of made-up traffic are of the same lengths."""
    extra = rules.template_tokens
    prefix = traffic.prefix_tokens + extra if traffic.prefix_tokens else 0
    document = prefix + traffic.document_tokens
    prompts, stored, context = [], [], document
    for turn in range(traffic.turns):
        prompts.append(context + traffic.question_tokens + extra * (1 if turn == 0 else 2))
        context = prompts[-1] + traffic.answer_tokens
        stored.append(context)
    return Lengths(prefix, document, tuple(prompts), tuple(stored))
