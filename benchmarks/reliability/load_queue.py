"""A burst of stored prompts: what each request waits, against the same burst without the tier.

    python -m benchmarks.reliability.load_queue [--requests 32] [--rounds 3] [--out FILE.json]
        [--tier-as-it-is]

One engine on the CPU with the reference model and its artifact at 8x. All prompts are in the tier
and in no block of vLLM's, and are asked for at once, three times: computed (every request opts out
of loading), with `load_gate` off, where every request is loaded, and with it on, as it is by
default. The three take turns `--rounds` times on the same engine.

All that again with a tier of which every load takes `SLOW` times as long as computing, without
using the CPU (threads sleep where they read a chunk). The first burst with the gate meets it
unprepared: what the engine measured until then is the tier as it is. `--tier-as-it-is` leaves the
slow tier out.

A wait is from when a load was ordered until the engine saw its end. It is divided by what
recomputing would have taken from then on in its place in the queue: the time in which the computed
burst of the same round had computed as many tokens as the request's and those of all before it,
loaded or computed. Above 1 the request should have been computed. First tokens are compared place
by place: the n-th of a burst with the n-th of the computed one.

The same is told in processor time, which is what all threads of this process have used since the
burst began, in the place of the clock. Other programs move the clock, in one burst more than in the
next, and not this one. It says how much work a request waited for: its own, that of what comes
before it, and what was done beside it. Of the slow tier it says nothing: its threads sleep.

The file is written after every burst, `complete` says whether it was the last one: a run that is
cut short leaves what it measured. A way is compared with the computed bursts of its own rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kvtc_vllm.artifact.replacing import replacing

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests" / "reference_model" / "model"
TOKENS = 1536
VOCABULARY = 2000
SLOW = 1.1
TIERS = {"tier as it is": 0.0, "slow tier": SLOW}
"""What a load takes longer, as multiples of computing it."""
WAYS = ("computed", "load_gate on", "load_gate off")


class Moment(NamedTuple):
    """In seconds. processor: of all threads of this process."""

    clock: float
    processor: float

    def since(self, other: Moment) -> Moment:
        """The seconds between."""
        return Moment(self.clock - other.clock, self.processor - other.processor)


def _now() -> Moment:
    return Moment(time.perf_counter(), time.process_time())


class Load(NamedTuple):
    """tokens: of its recomputation and of what is before it."""

    tokens: float
    began: Moment
    ended: Moment


class Bench:
    """One engine, whose gate is switched between bursts."""

    def __init__(self, requests: int) -> None:
        from tests.connector.engine import engine

        config = {
            "ratio": 8,
            "memory_bytes": "1GiB",
            "load_gate": True,
            "encode_share": 1,
            "recent_window": 128,
        }
        self._requests = requests
        self._number = 0
        self._engine = engine(
            MODEL,
            config,
            max_model_len=2048,
            max_num_seqs=requests,
            num_gpu_blocks_override=64 * (requests + 4),
        )

    def run(
        self, rounds: int, tiers: Iterable[str], save: Callable[[dict[str, Any]], object]
    ) -> dict[str, Any]:
        """Store, then let the three ways take turns; `save` gets what is known after each burst."""
        with self._engine as llm:
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler
            policy = scheduler._load_policy
            prompts = [self._prompt() for _ in range(self._requests)]
            self._ask(llm, prompts)
            self._settle(llm)
            alone = statistics.median(self._ask(llm, [self._prompt()])[0].clock for _ in range(5))
            for prompt in prompts[:6]:  # what the policy knows, as after some time of service
                assert llm.reset_prefix_cache()
                self._ask(llm, [prompt])
            watch = _Watch(policy)
            found: dict[str, Any] = {"computed alone, ms": round(1e3 * alone, 1)}
            for tier in tiers:
                _slow_down(scheduler, TIERS[tier] * alone)
                bursts: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
                for _ in range(rounds):
                    for way in WAYS:
                        self._settle(llm)
                        assert llm.reset_prefix_cache()
                        policy._enabled = way == "load_gate on"
                        watch.begin()
                        first = self._ask(llm, prompts, loads=way != "computed")
                        burst = {
                            "first": first,
                            "loads": list(watch.loads.values()),
                            "given up": watch.given_up,
                        }
                        bursts[way].append(burst)
                        found[tier] = _summary(bursts)
                        save(found)
            return found

    def _prompt(self) -> list[int]:
        self._number += 1
        return [(self._number * 7919 + 31 * i) % VOCABULARY + 1 for i in range(TOKENS)]

    def _ask(self, llm: Any, prompts: list[list[int]], loads: bool = True) -> list[Moment]:
        """Seconds to each first token, all asked at once, in order."""
        from vllm import SamplingParams

        settings = SamplingParams(
            temperature=0,
            max_tokens=2,
            ignore_eos=True,
            extra_args=None if loads else {"kv_transfer_params": {"kvtc_load": False}},
        )
        names = []
        began = _now()
        for prompt in prompts:
            self._number += 1
            names.append(f"r{self._number}")
            llm.llm_engine.add_request(names[-1], {"prompt_token_ids": prompt}, settings)
        first: dict[str, Moment] = {}
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                first.setdefault(output.request_id, _now().since(began))
        return [first[name] for name in names]

    def _settle(self, llm: Any) -> None:
        connector = llm.llm_engine.engine_core.engine_core.scheduler.connector
        while connector.has_pending_push_work():
            llm.llm_engine.step()


class _Watch:
    """Loads since `begin`."""

    def __init__(self, policy: Any) -> None:
        self.loads: dict[str, Load] = {}
        self.given_up = 0
        self._policy = policy
        self._planned, self._ended = policy.load_planned, policy.load_ended
        self._give_up = policy.give_up
        policy.load_planned, policy.load_ended = self._plan, self._end
        policy.give_up = self._end_early

    def begin(self) -> None:
        self.loads = {}
        self.given_up = 0

    def _end_early(self) -> list[str]:
        names: list[str] = self._give_up()
        self.given_up += sum(name in self.loads for name in names)
        return names

    def _plan(self, request_id: str, tokens: int) -> float:
        now = _now()
        self.loads[request_id] = Load(self._policy.tokens_before + tokens, now, now)
        return float(self._planned(request_id, tokens))

    def _end(self, request_id: str) -> None:
        if request_id in self.loads:
            self.loads[request_id] = self.loads[request_id]._replace(ended=_now())
        self._ended(request_id)


def _slow_down(scheduler: Any, seconds: float) -> None:
    """Have a load of a prompt take so long in all, over the threads that share it."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    worker = get_kv_transfer_group()._live_worker
    each = seconds * scheduler._config.load_threads / (TOKENS // scheduler._chunk_tokens - 1)
    read = type(worker.arena).read

    def slowly(key: Any) -> Any:
        time.sleep(each)
        return read(worker.arena, key)

    worker.arena.read = slowly


def _first_tokens(rounds: list[dict[str, Any]], measure: str) -> list[float]:
    """Seconds of each place in the burst, medians over the rounds. measure: of a `Moment`."""
    places = zip(*(burst["first"] for burst in rounds), strict=True)
    return [statistics.median(getattr(moment, measure) for moment in place) for place in places]


def _waits(
    rounds: list[dict[str, Any]], computed: list[dict[str, Any]], measure: str
) -> list[list[float]]:
    """Of each round, the waits as multiples of recomputing, see above."""
    waits = []
    for burst, other in zip(rounds, computed[: len(rounds)], strict=True):
        first = sorted(getattr(moment, measure) for moment in other["first"])
        waits.append(
            [
                getattr(load.ended.since(load.began), measure)
                / first[min(-(-int(load.tokens) // TOKENS), len(first)) - 1]
                for load in burst["loads"]
            ]
        )
    return waits


def _compared(
    rounds: list[dict[str, Any]], others: list[dict[str, Any]], measure: str
) -> dict[str, Any]:
    """Waits of all rounds together, longest of each; first tokens of the medians."""
    by_round = _waits(rounds, others, measure)
    waits = [wait for each in by_round for wait in each] or [0.0]
    first, computed = _first_tokens(rounds, measure), _first_tokens(others[: len(rounds)], measure)
    ratios = [mine / theirs for mine, theirs in zip(first, computed, strict=True)]
    return {
        "median wait / recomputation": round(statistics.median(waits), 2),
        "longest wait / recomputation": [round(max(each, default=0.0), 2) for each in by_round],
        "waits above recomputation, %": round(
            100 * sum(wait > 1 for wait in waits) / len(waits), 1
        ),
        "median first token / computed": round(statistics.median(ratios), 2),
        "worst first token / computed": round(max(ratios), 2),
        "mean first token / computed": round(statistics.mean(first) / statistics.mean(computed), 2),
    }


def _summary(bursts: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """By way; seconds are medians over the rounds."""
    found: dict[str, Any] = {}
    for way, rounds in bursts.items():
        if not rounds:
            continue
        first = _first_tokens(rounds, "clock")
        row: dict[str, Any] = {
            "mean first token, ms": round(1e3 * statistics.mean(first), 1),
            "last first token, ms": round(1e3 * max(first), 1),
            "last first token, processor ms": round(
                1e3 * max(_first_tokens(rounds, "processor")), 1
            ),
        }
        if way != "computed":
            row |= {
                "loads": [len(burst["loads"]) for burst in rounds],
                "given up": [burst["given up"] for burst in rounds],
                **_compared(rounds, bursts["computed"], "clock"),
                "in processor time": _compared(rounds, bursts["computed"], "processor"),
            }
        found[way] = row
    return found


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("load_queue.json"))
    parser.add_argument("--tier-as-it-is", action="store_true")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    about = {"requests": args.requests, "prompt_tokens": TOKENS, "rounds": args.rounds}
    tiers = [tier for tier, slow in TIERS.items() if not (slow and args.tier_as_it_is)]
    result = Bench(args.requests).run(args.rounds, tiers, partial(_save, args.out, about, False))
    print(_save(args.out, about, True, result), flush=True)


def _save(out: Path, about: dict[str, Any], complete: bool, result: dict[str, Any]) -> str:
    """Write what is known, whole or not at all, and return the text."""
    text = json.dumps(about | {"complete": complete} | result, indent=1)
    with replacing(out) as unfinished:
        unfinished.write_text(f"{text}\n")
    return text


if __name__ == "__main__":
    main()
