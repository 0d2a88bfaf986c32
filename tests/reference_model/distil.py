"""Train a graft of the reference model in a given number of minutes.

    python tests/reference_model/distil.py --kind states --minutes 25 --out build/states

First each new layer learns to do what the attention did whose place it has, on that one's own
inputs. Then the whole model learns from the reference model's predictions and from the data that
the reference model was trained on. Learning rate, lengths and difficulty follow the clock, so a
repetition gives another model of the same kind, not the same bytes.
`--out` receives the model as vLLM reads it, `state.pt` (for `--resume`) and `log.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as functional
from batches import Batch, BatchMaker
from grafts import GRAFTS, Graft
from torch import nn
from train import DECAY_FROM, TASK_SHARE, WARMUP_STEPS, Progress, difficulty, export, save_state
from transformers import AutoTokenizer, LlamaForCausalLM

TEACHER = Path(__file__).parent / "model"
PEAK = 2e-3
#: Learning rate of what the reference model brought along, relative to that of new layers.
OLD_SCALE = 0.1
TOKENS_PER_STEP = 2048
#: Share of the run in which new layers learn one by one.
ALONE = 0.3
#: (share of the run at which it starts, sequence length)
LENGTHS = ((0.0, 512), (0.6, 1024), (0.85, 2048))
SAVE_EVERY_SECONDS = 60.0


class Teacher:
    """The reference model; keeps what its attention got and gave in the last call."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model.eval().requires_grad_(False)
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.register_forward_hook(self._hook(number), with_kwargs=True)

    def _hook(self, number: int):  # type: ignore[no-untyped-def]
        def keep(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
            self.seen[number] = (kwargs["hidden_states"], output[0])

        return keep

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [rows, tokens, vocabulary]."""
        return self.model(input_ids=ids, use_cache=False).logits


def alone_loss(teacher: Teacher, graft: Graft, batch: Batch) -> torch.Tensor:
    """Mean over new layers of the share of the old ones' outputs that they miss."""
    teacher(batch.ids)
    losses = []
    for layer in graft.mixers:
        hidden, wanted = teacher.seen[layer]
        missed = graft.mix(layer, hidden) - wanted
        losses.append(missed.square().mean() / wanted.square().mean())
    return torch.stack(losses).mean()


def together_loss(
    teacher: Teacher, graft: Graft, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL from the reference model plus the loss on the data; and the latter, of fully weighted
    tokens, alone."""
    weights = batch.weights[:, 1:]
    wanted = functional.log_softmax(teacher(batch.ids)[:, :-1], -1).flatten(0, 1)
    logits = graft.model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
    logs = functional.log_softmax(logits, -1).flatten(0, 1)
    kl = functional.kl_div(logs, wanted, log_target=True, reduction="batchmean")
    losses = functional.nll_loss(logs, batch.ids[:, 1:].flatten(), reduction="none")
    losses = losses.view_as(weights)
    full = weights == 1.0
    data = (losses * weights).sum() / weights.sum()
    return kl + data, (losses.detach() * full).sum() / full.sum().clamp(min=1)


def make_optimizer(graft: Graft) -> torch.optim.AdamW:
    """AdamW; decay on matrices only, slow steps for what is not new."""
    new = {id(p) for mixer in graft.mixers.values() for p in mixer.parameters()}
    groups = []
    for decay in (0.1, 0.0):
        for scale in (OLD_SCALE, 1.0):
            chosen = [
                p
                for p in graft.model.parameters()
                if (p.dim() > 1) == (decay > 0) and (id(p) in new) == (scale == 1.0)
            ]
            groups.append({"params": chosen, "weight_decay": decay, "scale": scale})
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(steps: int, share: float) -> float:
    """Warm-up, plateau, linear decay."""
    warm = min(1.0, (steps + 1) / WARMUP_STEPS)
    decay = 1.0 if share < DECAY_FROM else (1.0 - share) / (1.0 - DECAY_FROM)
    return PEAK * warm * max(decay, 0.01)


def train(kind: str, minutes: float, out: Path, seed: int, resume: bool) -> None:
    """Train until `minutes`, those of a resumed run included, have passed."""
    torch.manual_seed(seed)
    teacher = Teacher(LlamaForCausalLM.from_pretrained(TEACHER, dtype=torch.float32))
    graft = GRAFTS[kind](teacher.model)
    graft.model.train().requires_grad_(True)
    optimizer = make_optimizer(graft)
    progress = Progress()
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    out.mkdir(parents=True, exist_ok=True)
    if resume:
        state = torch.load(out / "state.pt", weights_only=True)
        graft.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(**state["progress"])
    maker = BatchMaker(tokenizer, seed + progress.steps)

    last = time.monotonic()
    saved = last
    means: dict[str, float] = {}
    with open(out / "log.jsonl", "a", encoding="utf-8") as log:
        while (share := progress.seconds / (minutes * 60)) < 1.0:
            length = [length for start, length in LENGTHS if share >= start][-1]
            rows = TOKENS_PER_STEP // length
            batch = maker.draw(rows, length, difficulty(max(share, 0.5)), TASK_SHARE)
            for parameters in optimizer.param_groups:
                parameters["lr"] = parameters["scale"] * learning_rate(progress.steps, share)
            if share < ALONE:
                loss = alone_loss(teacher, graft, batch)
                values = {"missed": loss.item()}
            else:
                loss, full = together_loss(teacher, graft, batch)
                values = {"loss": loss.item(), "full_loss": full.item()}
            loss.backward()
            nn.utils.clip_grad_norm_(graft.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            now = time.monotonic()
            progress.seconds += now - last
            last = now
            progress.steps += 1
            progress.tokens += rows * length
            for name, value in values.items():
                means[name] = 0.95 * means.get(name, value) + 0.05 * value
            if progress.steps % 10 == 0:
                log.write(json.dumps({**asdict(progress), **means, "length": length}) + "\n")
                log.flush()
            if now - saved > SAVE_EVERY_SECONDS:
                save_state(out / "state.pt", graft.model, optimizer, progress)
                saved = now
    export(graft.model, tokenizer, out / "model")
    save_state(out / "state.pt", graft.model, optimizer, progress)
    print(json.dumps({**asdict(progress), **means}))


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=sorted(GRAFTS), required=True)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.kind, arguments.minutes, arguments.out, arguments.seed, arguments.resume)


if __name__ == "__main__":
    main()
