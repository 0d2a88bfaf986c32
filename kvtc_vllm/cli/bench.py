"""Put multi-turn load on a running OpenAI-compatible server, or on two in alternation.

    kvtc bench http://localhost:8000 --clients 16 --turns 6 --document-tokens 4000
    kvtc bench http://localhost:8000 http://localhost:8001 --documents 20 --zipf 0.8
    kvtc bench http://localhost:8000 --trace trace.jsonl

With two servers every turn is asked of both, with the same messages, in changing order: the
figures are pairs, and the share of equal answers is told. A trace is JSONL as `vllm bench serve`
and guidellm read it: timed traces (timestamp, input_length, output_length, hash_ids), prompts,
ShareGPT conversations, messages. JSON has the names of `vllm bench serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path

import msgspec

from kvtc_vllm.cli.extras import require
from kvtc_vllm.load_test.conversation import Conversation
from kvtc_vllm.load_test.errors import LoadTestError
from kvtc_vllm.load_test.runner import Request
from kvtc_vllm.load_test.trace import TraceForm, read_trace
from kvtc_vllm.load_test.traffic import Traffic, conversations

PROGRESS_SECONDS = 2.0
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
TRAFFIC_HELP = {
    "conversations": "conversations in all",
    "turns": "questions per conversation",
    "think_seconds": "mean seconds between an answer and the next question (exponential)",
    "prefixes": "different system messages",
    "prefix_tokens": "tokens of a system message, 0: none",
    "documents": "size of the pool of documents, 0: one of its own per conversation",
    "document_tokens": "tokens of a document, 0: none",
    "zipf": "exponent of the popularity of documents and system messages, 0: all alike",
    "question_tokens": "tokens of a question",
    "answer_tokens": "most tokens of an answer",
    "seed": "of all that is drawn",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("url", nargs="+", help="one server, or two to compare")
    parser.add_argument("--model", help="name to ask for; default: the first that a server has")
    parser.add_argument("--clients", type=int, default=8, help="conversations at once")
    add_traffic_arguments(parser)
    parser.add_argument("--trace", type=Path, help="JSONL to replay instead of made-up traffic")
    parser.add_argument(
        "--timed-trace-chunk-hash-size", type=int, default=16, help="tokens behind one hash id"
    )
    parser.add_argument(
        "--timed-trace-sec-multiplier", type=float, default=1.0, help="seconds of one time unit"
    )
    parser.add_argument(
        "--ignore-eos", action="store_true", help="full length of answers (vLLM only)"
    )
    parser.add_argument("--no-metrics", action="store_true", help="do not read /metrics")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds per request")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="write JSON with every request to this file")
    parser.add_argument("--plot", type=Path, help="write a picture (PNG, SVG, PDF) to this file")


def add_traffic_arguments(parser: argparse.ArgumentParser) -> None:
    """One option per field of `Traffic`, with its default."""
    fields = msgspec.structs.fields(Traffic)
    group = parser.add_argument_group("traffic")
    for field in fields:
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=field.type,
            default=field.default,
            help=f"{TRAFFIC_HELP[field.name]} (default {field.default})",
        )


def traffic_of(args: argparse.Namespace) -> Traffic:
    """The traffic that the options describe. Raises LoadTestError."""
    names = [field.name for field in msgspec.structs.fields(Traffic)]
    return Traffic(**{name: getattr(args, name) for name in names})


def run(args: argparse.Namespace) -> int:
    """Exit status 1 if a request failed."""
    require("kvtc bench", "bench", *(["matplotlib"] if args.plot else []))
    from kvtc_vllm.load_test.client import Server
    from kvtc_vllm.load_test.report import plot, table
    from kvtc_vllm.load_test.session import measure

    if args.clients < 1:
        raise LoadTestError(f"--clients is {args.clients}, 1 or more is right")
    if not args.timeout > 0:
        raise LoadTestError(f"--timeout is {args.timeout:g}, more than 0 is right")
    _check_files(args)
    said, traffic = _conversations(args)
    servers = [
        Server(
            url,
            model=args.model,
            api_key=os.environ.get("OPENAI_API_KEY", ""),
            timeout_seconds=args.timeout,
            ignore_eos=args.ignore_eos,
        )
        for url in args.url
    ]
    turns = sum(len(one.turns) for one in said)
    progress = Progress(turns)
    result = asyncio.run(
        measure(servers, said, args.clients, metrics=not args.no_metrics, done=progress.take)
    )
    result = {"traffic": traffic, **result}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result, args.plot)
    if args.json:
        print(json.dumps({k: v for k, v in result.items() if k != "requests"}, indent=1))
    else:
        print(table(result))
    return 1 if any(server["failed"] for server in result["servers"]) else 0


def _check_files(args: argparse.Namespace) -> None:
    """Before the load, not after it. Raises LoadTestError."""
    for option, path in (("--out", args.out), ("--plot", args.plot)):
        if path is not None and not path.absolute().parent.is_dir():
            raise LoadTestError(f"{option} {path}: there is no directory {path.absolute().parent}")
    if args.plot is not None and args.plot.suffix.lower() not in PLOT_SUFFIXES:
        raise LoadTestError(f"--plot {args.plot}: its name must end in {', '.join(PLOT_SUFFIXES)}")


def _conversations(args: argparse.Namespace) -> tuple[list[Conversation], dict[str, object]]:
    traffic = traffic_of(args)
    if args.trace is None:
        return conversations(traffic), msgspec.to_builtins(traffic)
    form = TraceForm(
        args.timed_trace_chunk_hash_size,
        args.timed_trace_sec_multiplier,
        traffic.answer_tokens,
        traffic.think_seconds,
    )
    if form.block_tokens < 1:
        raise LoadTestError(
            f"--timed-trace-chunk-hash-size is {form.block_tokens}, 1 or more is right"
        )
    return read_trace(args.trace, form), {"trace": args.trace.name}


class Progress:
    """A line on stderr every few seconds, over itself on a terminal."""

    def __init__(self, turns: int) -> None:
        self._turns = turns
        self._done = self._failed = 0
        self._began = self._said = time.monotonic()

    def take(self, request: Request) -> None:
        """Count one turn."""
        self._done += 1
        self._failed += any(answer.error for answer in request.answers)
        now = time.monotonic()
        if now - self._said < PROGRESS_SECONDS and self._done < self._turns:
            return
        self._said = now
        terminal = sys.stderr.isatty()
        end = "\n" if not terminal or self._done == self._turns else ""
        print(
            f"{chr(13) if terminal else ''}{self._done} of {self._turns} turns, "
            f"{self._failed} failed, {now - self._began:.0f} s",
            end=end,
            file=sys.stderr,
            flush=True,
        )
