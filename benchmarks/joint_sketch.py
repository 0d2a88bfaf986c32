"""What a sketch of coefficients could add to `joint: delta`'s token windows, at best.

    python -m benchmarks.joint_sketch --model DIR --data DIR --artifact DIR
                                      [--traces edited,renamed,reworded,chats] [--ratio 16]
                                      [--out benchmarks/results/joint_sketch.json]

A sketch (SimHash, Johnson-Lindenstrauss) finds chunks whose coefficients are similar although their
tokens are not equal. Here every token that windows of tokens give no representative is compared
with *all* tokens stored before, in the leading coefficients, exactly: no sketch finds more. The
nearest is taken where the coder would need fewer bits for the difference, the name of the token
included (four bytes where it does not go on from the token before), and a chunk keeps whichever is
smaller. Bytes are those of the coder that serves.

`windows` is `joint: delta` as it is: windows of 32 tokens find chunks, windows of eight more of the
tokens of those. `long windows` does without the latter. `short windows` finds chunks by windows of
eight, all of which are remembered. `nearest` is `windows` and the nearest tokens.

edited: ten versions of a source file, each with one more edit. renamed: the file with other names
of variables each time. reworded: essays of which every eighth word is another one, so that no
window of 32 tokens comes again. chats: as in `benchmarks.joint_delta`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import re
import textwrap
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.joint_delta import CHUNK, PASSAGE, ROOT, SYSTEMS, TENANT, Trace, compute
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.cpu import delta
from kvtc_vllm.codec.cpu.level_coder import NO_SOURCE
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.v2.codec import ENTROPY
from kvtc_vllm.tiers import token_windows
from kvtc_vllm.tiers.delta_store import LARGEST_SHARE
from kvtc_vllm.tiers.keys import RecordKey

LEADING = 64
"""Coefficients of K and of V by which tokens are compared."""
NAME_BITS = 32
SHORT = 8
WAYS = ("off", "long windows", "windows", "short windows", "nearest")
Levels = npt.NDArray[np.int32]


class Stored:
    """All tokens of the chunks stored so far, and their windows."""

    def __init__(self, artifact: RankArtifact, ratio: float) -> None:
        self._codec = open_codec("kvtc2", torch.bfloat16, artifact=artifact, ratio=ratio)
        self._coder = delta.DeltaCoder(artifact, replace(ENTROPY, level=1))
        self._windows = {
            "long windows": Windows(SHORT_WINDOW=CHUNK + 1),
            "windows": Windows(),
            "short windows": Windows(WINDOW=SHORT, _SAMPLED=1, LEAST_RUN=SHORT),
        }
        self._opened: dict[RecordKey, Any] = {}
        self._levels: list[list[Levels]] = []
        self._leading: list[npt.NDArray[np.float32]] = []
        self.bytes = dict.fromkeys(WAYS, 0)
        self.near_tokens = self.tokens = 0

    def add(self, ids: Sequence[int], k: torch.Tensor, v: torch.Tensor) -> None:
        """The chunks of a prompt that are not there yet. k, v: [T, L, H, D]."""
        new = []
        for start in range(0, len(ids) - CHUNK + 1, CHUNK):
            end = start + CHUNK
            key = RecordKey(array("i", ids[:end]).tobytes())
            if key in self._opened:
                continue
            blob = self._codec.encode(k[start:end], v[start:end], start)
            new.append((key, self._measure(key, blob, array("i", ids[start:end]).tobytes())))
        for _, levels in new:  # a prompt is not told from itself
            self._levels.append(levels)
            self._leading.append(_leading(levels))

    def _measure(self, key: RecordKey, blob: bytes, tokens: bytes) -> list[Levels]:
        opened = self._opened[key] = self._coder._open(blob)
        parts = [
            (plan, opened.levels(section.kind, section.group), (section.kind, section.group))
            for plan, section in zip(opened.plans, opened.info.sections, strict=True)
            if plan is not None
        ]
        levels = [own for _, own, _ in parts]
        fixed = len(blob) - sum(
            section.stored_length
            for plan, section in zip(opened.plans, opened.info.sections, strict=True)
            if plan is not None
        )
        self.bytes["off"] += len(blob)
        told: dict[str, list[Levels]] = {}
        for way, windows in self._windows.items():
            found = windows.find(key, tokens)
            told[way] = self._predicted(opened, parts, found)
            named = 0 if found is None else 16 * len(found.sources) + 8 * len(found.runs)
            self.bytes[way] += self._taken(parts, told[way], fixed + named, len(blob))
            windows.add(key, tokens)
        base = self._taken(parts, told["windows"], fixed, len(blob))
        near, bits = self._nearest(levels, told["windows"])
        self.bytes["nearest"] += min(base, self._taken(parts, near, fixed + bits // 8, len(blob)))
        self.tokens += opened.coded
        return levels

    def _predicted(self, opened: Any, parts: Sequence[Any], found: Any) -> list[Levels]:
        if found is None:
            return [np.full_like(own, NO_SOURCE) for _, own, _ in parts]
        alike = [self._opened[name] for name in found.sources]
        sinks = opened.info.header.sinks
        places = [delta._alike(opened.marks, sinks, alike[run[1]], run) for run in found.runs]
        return [
            delta._predicted(own.shape, alike, part_of, found.runs, places)
            for _, own, part_of in parts
        ]

    def _nearest(
        self, levels: Sequence[Levels], told: Sequence[Levels]
    ) -> tuple[list[Levels], int]:
        """What levels are told from with the nearest tokens too, and the bits of their names."""
        found = [own.copy() for own in told]
        free = np.flatnonzero(told[0][0] == NO_SOURCE)
        if not self._leading or not len(free):
            return found, 0
        stored = np.concatenate(self._leading)
        places = torch.cdist(
            torch.from_numpy(_leading(levels)[free]), torch.from_numpy(stored)
        ).argmin(dim=1)
        chosen = [np.concatenate([own[n] for own in self._levels], axis=1) for n in (0, 1)]
        bits, last = 0, (-2, -2)
        for token, place in zip(free.tolist(), places.tolist(), strict=True):
            name = 0 if last == (token - 1, place - 1) else NAME_BITS
            gain = sum(
                _bits(own[:, token]) - _bits(own[:, token] - other[:, place])
                for own, other in zip(levels, chosen, strict=True)
            )
            if gain > name:
                for target, other in zip(found, chosen, strict=True):
                    target[:, token] = other[:, place]
                bits += name
                last = (token, place)
                self.near_tokens += 1
        return found, bits

    @staticmethod
    def _taken(parts: Sequence[Any], told: Sequence[Levels], fixed: int, whole: int) -> int:
        """Bytes of the difference, or of the blob where it is kept whole."""
        if all((own == NO_SOURCE).all() for own in told):
            return whole
        total = fixed
        for (plan, own, _), wanted in zip(parts, told, strict=True):
            coded = delta._put(plan, own, wanted, 8 * own.size)
            assert coded is not None
            total += len(coded)
        return total if total <= LARGEST_SHARE * whole else whole


class Windows:
    """`TokenWindows` with constants of their own."""

    def __init__(self, **settings: int) -> None:
        self._windows = token_windows.TokenWindows()
        self._settings = settings

    def add(self, key: RecordKey, tokens: bytes) -> None:
        self._with_settings(lambda: self._windows.add(key, TENANT, tokens))

    def find(self, key: RecordKey, tokens: bytes) -> Any:
        return self._with_settings(lambda: self._windows.find(key, TENANT, tokens))

    def _with_settings(self, call: Any) -> Any:
        before = {name: getattr(token_windows, name) for name in self._settings}
        for name, value in self._settings.items():
            setattr(token_windows, name, value)
        try:
            return call()
        finally:
            for name, value in before.items():
                setattr(token_windows, name, value)


class Similar(Trace):
    """Traces in which texts come again, similar and not equal."""

    def prompts(self, name: str) -> Iterator[list[int]]:
        """Of one trace."""
        if name == "renamed":
            return self._renamed()
        if name == "reworded":
            return self._reworded()
        return super().prompts(name)

    def _renamed(self) -> Iterator[list[int]]:
        source = "\n".join(inspect.getsource(textwrap).splitlines()[:110])
        names = ("self", "text", "width", "chunks", "lines", "indent", "tabs", "sentence")
        for version in range(6):
            own = source
            for name in names if version else ():
                own = re.sub(rf"\b{name}\b", f"{name}{version}", own)
            yield self._encode(SYSTEMS[0] + own)

    def _reworded(self) -> Iterator[list[int]]:
        rng = random.Random(0)
        for essay in self._essays[:2]:
            words = self._decode(essay[:PASSAGE]).split(" ")
            for version in range(3):
                own = list(words)
                for place in range(version, len(own), 8) if version else ():
                    own[place] = rng.choice(words)
                yield self._encode(SYSTEMS[0] + " ".join(own))

    def __init__(self, data: Path, tokenizer: Any) -> None:
        super().__init__(data, tokenizer)
        self._decode = tokenizer.decode


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.joint_sketch", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the model")
    parser.add_argument("--data", type=Path, required=True, help="directory of the documents")
    parser.add_argument("--artifact", type=Path, required=True, help="of codec kvtc2")
    parser.add_argument("--traces", default="edited,renamed,reworded,chats")
    parser.add_argument("--ratio", type=float, default=16.0, help="target ratio")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/joint_sketch.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    trace = Similar(args.data, AutoTokenizer.from_pretrained(args.model))
    artifact = load_rank_artifact(args.artifact, 0)[0]
    rows = {}
    for name in args.traces.split(","):
        stored = Stored(artifact, args.ratio)
        for ids in trace.prompts(name):
            stored.add(ids, *compute(model, ids))
        taken = stored.bytes
        rows[name] = {
            "bytes": taken,
            **{f"saved by {way}": round(1 - taken[way] / taken["off"], 4) for way in WAYS[1:]},
            "saved beyond windows": round((taken["windows"] - taken["nearest"]) / taken["off"], 4),
            "tokens": stored.tokens,
            "tokens told from the nearest": stored.near_tokens,
        }
        print(name, rows[name], flush=True)
    result = {
        "command": "python -m benchmarks.joint_sketch --model DIR --data DIR --artifact DIR",
        "model": args.model.name,
        "artifact": artifact.fingerprint.hex(),
        "target_ratio": args.ratio,
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def _leading(levels: Sequence[Levels]) -> npt.NDArray[np.float32]:
    """float32 [T, columns]."""
    return np.concatenate([own[:LEADING] for own in levels]).T.astype(np.float32)


def _bits(levels: Levels) -> float:
    """About what the coder takes for levels told from others."""
    return float(2 * np.log2(1 + np.abs(levels)).sum())


if __name__ == "__main__":
    main()
