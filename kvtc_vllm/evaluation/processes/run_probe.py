"""Body of one child process: what noise in the cache does to continuations, place by place.

python -m kvtc_vllm.evaluation.processes.run_probe JOB.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from kvtc_vllm.evaluation.methods import Method
from kvtc_vllm.evaluation.replay.engine import ReplayEngine, replay_engine, scratch
from kvtc_vllm.evaluation.replay.noise import TALLY, Noise
from kvtc_vllm.evaluation.replay.round_trips import TURN
from kvtc_vllm.evaluation.replay.two_passes import (
    Batch,
    Exact,
    batches,
    exact_pass,
    replay_pass,
)
from kvtc_vllm.evaluation.tasks import Example, Session

CHILD = "kvtc_vllm.evaluation.processes.run_probe"
TASK = "probe"


class ProbeJob(msgspec.Struct, frozen=True, kw_only=True):
    """What one process does.

    documents: token ids, at least `prefix_tokens` + 2 of each; what follows the prefix and the
    token after it is scored. prefix_tokens: whole chunks. noises: by name. engine: further
    `vllm.LLM` arguments. out: file for the outcome.
    """

    model: str
    documents: list[list[int]]
    prefix_tokens: int
    noises: dict[str, Noise]
    engine: dict[str, Any]
    out: str


class Effect(msgspec.Struct, frozen=True, kw_only=True):
    """Of one noise over all documents. kl: nats, summed. energy: sum of squared noise.

    tokens: those that had noise.
    """

    kl: float
    energy: float
    tokens: int


class ProbeOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """floor: KL of replays without noise, in nats, summed: rounding. effects: by name."""

    floor: float
    effects: dict[str, Effect]


def run(job: ProbeJob) -> ProbeOutcome:
    """Replay every document once per noise, over one exact pass. Raises ReplayError."""
    # No recent window: like gradients, the probe is of all tokens before the continuation.
    trips = {name: {"noise": msgspec.to_builtins(noise)} for name, noise in job.noises.items()}
    method = Method(TASK, "noise", override={"round_trips": trips}, window=0)
    cut = job.prefix_tokens + 1
    sessions = [Session([Example(ids[:cut], ids[cut:], False)]) for ids in job.documents]
    prompts = (2 + len(job.noises)) * len(sessions)
    with (
        tqdm(total=prompts, desc=TASK, unit="prompt", mininterval=2.0) as bar,
        scratch() as directory,
        replay_engine(job.model, method, method.chunk_tokens, job.engine) as engine,
    ):
        return _replay_all(engine, job, sessions, directory, bar)


def _replay_all(
    engine: ReplayEngine, job: ProbeJob, sessions: list[Session], directory: Path, bar: Any
) -> ProbeOutcome:
    floor = 0.0
    effects = {name: Effect(kl=0.0, energy=0.0, tokens=0) for name in job.noises}
    for batch in batches(sessions):
        TURN.begin(None)
        with exact_pass(engine, TASK, job.prefix_tokens, batch, directory, bar.update) as exact:

            def replayed(name: str | None, batch: Batch = batch, exact: Exact = exact) -> float:
                TURN.begin(name)
                found = replay_pass(
                    engine, TASK, job.prefix_tokens, batch, directory, exact, bar.update
                )
                return sum(record.kl for record in found)

            floor += replayed(None)
            for name, before in effects.items():
                TALLY.clear()
                kl = replayed(name)
                energy, tokens = TALLY.total()
                effects[name] = Effect(
                    kl=before.kl + kl, energy=before.energy + energy, tokens=before.tokens + tokens
                )
    return ProbeOutcome(floor=floor, effects=effects)


def main() -> None:
    """Read the job, run it, write the outcome."""
    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=ProbeJob)
    Path(job.out).write_bytes(msgspec.msgpack.encode(run(job)))


if __name__ == "__main__":
    main()
