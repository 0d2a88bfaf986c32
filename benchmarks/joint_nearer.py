"""Levels nearer to the representative's: what `joint: delta` would gain by no longer being exact.

    python -m benchmarks.joint_nearer --model DIR --data DIR --artifact DIR
                                      [--count N] [--out benchmarks/results/joint_nearer.json]

An essay is stored behind one system prompt, and comes again behind another. Of the second prompt
768 tokens go through the codec and back, 128 exact tokens follow, KL is over the next 128. `exact`
is `joint: delta` as it is: differences give the very bytes back. `nearer` quantises with the
representative's levels in sight: of all levels within `reach` steps of the coefficient, the one
nearest to the representative's; half a step is what rounding allows anyway. Everything else is the
codec: the blobs are ordinary ones, and bytes are those of their differences by the coder that
serves, or of the blob where it is kept whole.

`bytes_at_equal_kl` compares with `exact` of a coarser or finer plan of the same KL, by
interpolation between plans of the logarithms of both.
"""

from __future__ import annotations

import argparse
import gzip
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.joint_delta import CHUNK, ROOT, SYSTEMS
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.calibration.cache_replay import Prefix, compute_prefix, interval, kl, score
from kvtc_vllm.codec.artifact import RankArtifact, SectionBasis, SectionKey
from kvtc_vllm.codec.cpu import delta
from kvtc_vllm.codec.cpu.level_coder import NO_SOURCE
from kvtc_vllm.codec.frame import SECTION_NAME
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.v2.codec import ENTROPY
from kvtc_vllm.codec.v2.plan import StepPlan, step_plan
from kvtc_vllm.tiers.delta_store import LARGEST_SHARE
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.token_windows import TokenWindows

PREFIX, EXACT, SCORED = 768, 128, 128
REACHES = (0.6, 0.75, 1.0, 1.5)
TENANT = b"one tenant"
Levels = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class NearPlan(StepPlan):
    """A plan that quantises towards `wanted`, int32 [r, T], where it is not `NO_SOURCE`."""

    reach: float = 0.5
    wanted: Levels | None = None

    def quantise(self, coefficients: torch.Tensor) -> torch.Tensor:
        codes = super().quantise(coefficients)
        if self.wanted is None:
            return codes
        scaled = (coefficients[:, : self.rank].T * self.inverse_step).numpy()
        sizes = (codes.numpy() + 1) >> 1
        own = np.where(codes.numpy() & 1, sizes, -sizes)
        # Rounding may already lie further away than `reach`: it is never left for less.
        low = np.minimum(np.ceil(scaled - self.reach), own)
        high = np.maximum(np.floor(scaled + self.reach), own)
        nearer = np.clip(self.wanted, low, high).astype(np.int32)
        levels = np.where(self.wanted == NO_SOURCE, own, nearer)
        return torch.from_numpy(2 * np.abs(levels) - (levels > 0)).int()


class Pair:
    """An essay behind two system prompts."""

    def __init__(self, first: Prefix, again: Prefix) -> None:
        self.first, self.again = first, again
        windows = TokenWindows()
        for start in range(0, PREFIX, CHUNK):
            windows.add(_name(start), TENANT, _tokens(first.ids, start))
        self.found = [
            windows.find(RecordKey(b"new"), TENANT, _tokens(again.ids, start))
            for start in range(0, PREFIX, CHUNK)
        ]


class Plan:
    """Blobs and differences at one target ratio."""

    def __init__(self, artifact: RankArtifact, ratio: float) -> None:
        self._artifact, self._ratio = artifact, ratio
        self._codec = self._open(artifact)
        self._differences = delta.DeltaCoder(artifact, replace(ENTROPY, level=1))

    def exact(self, prefix: Prefix) -> list[bytes]:
        """Blobs of a prompt as the codec writes them."""
        return [
            self._codec.encode(
                prefix.k[start : start + CHUNK], prefix.v[start : start + CHUNK], start
            )
            for start in range(0, PREFIX, CHUNK)
        ]

    def nearer(
        self, pair: Pair, sources: Sequence[bytes], exact: Sequence[bytes], reach: float
    ) -> list[bytes]:
        """Blobs of the second prompt with levels nearer to those of the first."""
        made = []
        for number, found in enumerate(pair.found):
            if found is None:
                made.append(exact[number])
                continue
            named = [sources[_number(name)] for name in found.sources]
            wanted = self._predictions(exact[number], named, found.runs)
            sections = {
                key: self._towards(section, wanted[key], reach)
                for key, section in self._artifact.sections.items()
            }
            codec = self._open(replace(self._artifact, sections=sections))
            start = number * CHUNK
            part = slice(start, start + CHUNK)
            made.append(codec.encode(pair.again.k[part], pair.again.v[part], start))
        return made

    def taken(self, pair: Pair, sources: Sequence[bytes], blobs: Sequence[bytes]) -> int:
        """Bytes of the second prompt beside the first."""
        total = 0
        for blob, found in zip(blobs, pair.found, strict=True):
            difference = None
            if found is not None:
                named = [sources[_number(name)] for name in found.sources]
                most = int(LARGEST_SHARE * len(blob))
                difference = self._differences.encode(blob, named, found.runs, most)
            total += len(blob if difference is None else difference)
        return total

    def divergence(self, model: Any, pair: Pair, blobs: Sequence[bytes]) -> float:
        """KL of the second prompt's continuation, nats per token."""
        chunks = [
            self._codec.decode(blob, number * CHUNK, CHUNK) for number, blob in enumerate(blobs)
        ]
        k, v = torch.cat([c.k for c in chunks]), torch.cat([c.v for c in chunks])
        return kl(pair.again.exact, score(model, pair.again.ids, k, v, SCORED))

    def _predictions(
        self, blob: bytes, sources: Sequence[bytes], runs: Sequence[delta.Run]
    ) -> dict[SectionKey, Levels]:
        """By section, what the coder of differences tells levels from."""
        opened = self._differences._open(blob)
        alike = [self._differences._open(source) for source in sources]
        sinks = opened.info.header.sinks
        places = [delta._alike(opened.marks, sinks, alike[run[1]], run) for run in runs]
        found = {}
        for plan, section in zip(opened.plans, opened.info.sections, strict=True):
            if plan is not None:
                part_of = (section.kind, section.group)
                shape = (plan.rank, opened.coded)
                levels = delta._predicted(shape, alike, part_of, runs, places)
                found[section.group, SECTION_NAME[section.kind]] = levels
        return found

    def _open(self, artifact: RankArtifact) -> Any:
        return open_codec("kvtc2", torch.bfloat16, artifact=artifact, ratio=self._ratio, fast=False)

    def _towards(self, section: SectionBasis, wanted: Levels, reach: float) -> SectionBasis:
        plan = step_plan(section, self._ratio)
        fields = {name: getattr(plan, name) for name in StepPlan.__dataclass_fields__}
        near = NearPlan(**fields, reach=reach, wanted=wanted)
        return replace(section, plans={**section.plans, self._ratio: near})


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.joint_nearer", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the model")
    parser.add_argument("--data", type=Path, required=True, help="directory of the documents")
    parser.add_argument("--artifact", type=Path, required=True, help="of codec kvtc2")
    parser.add_argument("--count", type=int, default=4, help="documents")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/joint_nearer.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    artifact = load_rank_artifact(args.artifact, 0)[0]
    pairs = list(_pairs(model, tokenizer, args.data, args.count))
    rows = []
    for ratio in sorted(artifact.ratios()):
        rows += measure(model, pairs, Plan(artifact, ratio), ratio)
    result = {
        "command": "python -m benchmarks.joint_nearer --model DIR --data DIR --artifact DIR "
        f"--count {args.count}",
        "model": args.model.name,
        "artifact": artifact.fingerprint.hex(),
        "unit": "KL in nats per token, mean over documents; bytes of the second prompts' 768 "
        "tokens, all documents; [low, high] is 95 %",
        "rows": at_equal_kl(rows),
    }
    print(json.dumps(result, indent=1))
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(model: Any, pairs: Sequence[Pair], plan: Plan, ratio: float) -> list[dict[str, Any]]:
    """A row per way to quantise."""
    bases = [(plan.exact(pair.first), plan.exact(pair.again)) for pair in pairs]
    ways: list[tuple[str, list[list[bytes]]]] = [("exact", [again for _, again in bases])]
    for reach in REACHES:
        made = [plan.nearer(p, *base, reach) for p, base in zip(pairs, bases, strict=True)]
        ways.append((f"nearer {reach:g}", made))
    rows = []
    for name, blobs in ways:
        divergences = [
            plan.divergence(model, pair, own) for pair, own in zip(pairs, blobs, strict=True)
        ]
        rows.append(
            {
                "target_ratio": ratio,
                "way": name,
                "blob_bytes": sum(len(blob) for own in blobs for blob in own),
                "bytes": sum(
                    plan.taken(pair, first, own)
                    for pair, (first, _), own in zip(pairs, bases, blobs, strict=True)
                ),
                "kl": round(sum(divergences) / len(divergences), 6),
                "interval": [round(value, 6) for value in interval(divergences)],
            }
        )
        print(rows[-1], flush=True)
    return rows


def at_equal_kl(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to each row its bytes over those of `exact` at the same KL; None outside the plans."""
    exact = sorted((row["kl"], row["bytes"]) for row in rows if row["way"] == "exact")
    kls, taken = (np.log(np.array(column, np.float64)) for column in zip(*exact, strict=True))
    found = []
    for row in rows:
        inside = exact[0][0] <= row["kl"] <= exact[-1][0]
        same = float(np.exp(np.interp(np.log(row["kl"]), kls, taken)))
        found.append(
            {**row, "bytes_at_equal_kl": round(row["bytes"] / same, 3) if inside else None}
        )
    return found


def _pairs(model: Any, tokenizer: Any, data: Path, count: int) -> Any:
    with gzip.open(data / "essays.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"] for line in file][3::4]
    length = PREFIX + EXACT + SCORED
    essays = [ids for ids in map(tokenizer.encode, texts) if len(ids) > length][:count]
    for number, essay in enumerate(essays):
        prompts = [[*tokenizer.encode(system), *essay][:length] for system in SYSTEMS[:2]]
        yield Pair(
            *(compute_prefix(model, f"essay {number}", ids, PREFIX, SCORED) for ids in prompts)
        )


def _name(start: int) -> RecordKey:
    return RecordKey(b"%d" % (start // CHUNK))


def _number(name: RecordKey) -> int:
    return int(name)


def _tokens(ids: Sequence[int], start: int) -> bytes:
    return array("i", ids[start : start + CHUNK]).tobytes()


if __name__ == "__main__":
    main()
