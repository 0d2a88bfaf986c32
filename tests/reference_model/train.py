"""Train the reference model from nothing in a given number of minutes.

    python tests/reference_model/train.py --minutes 50 --out build/reference_model

Learning rate, sequence length and task difficulty follow the share of the
minutes that has passed, so a run always ends its decay on time, on any machine.
`--out` receives `state.pt` (for `--resume`), `log.jsonl` and the exported model.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as functional
from batches import Batch, BatchMaker
from parallel import Group
from presets import PRESETS, Preset
from start import gentle, prepare
from tokenizer import train_tokenizer
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WARMUP_STEPS = 20
#: Share of the rows of a batch that are packs of tasks.
TASK_SHARE = 0.5
#: Share of the run after which the learning rate decays, linearly, to nothing.
DECAY_FROM = 0.6
#: Learning rate of what `start` made by hand, relative to that of the rest.
GENTLE_SCALE = 0.1
EXPORT_EVERY_SECONDS = 100.0


@dataclass
class Progress:
    """How far a run has come; saved with it."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


def learning_rate(preset: Preset, progress: Progress, share: float) -> float:
    """Warm-up, plateau, linear decay."""
    warm = min(1.0, (progress.steps + 1) / WARMUP_STEPS)
    decay = 1.0 if share < DECAY_FROM else (1.0 - share) / (1.0 - DECAY_FROM)
    return preset.learning_rate * warm * max(decay, 0.01)


def sequence_length(preset: Preset, share: float) -> int:
    """The longest length whose start has been reached."""
    return [length for start, length in preset.lengths if share >= start][-1]


def difficulty(share: float) -> float:
    """0 at first, so that copying in context is found early; 1 from four fifths on."""
    return min(1.0, max(0.0, (share - 0.1) / 0.7))


def weighted_loss(
    model: LlamaForCausalLM, batch: Batch, preset: Preset
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean weighted loss, and the mean loss of the fully weighted tokens alone."""
    ids, weights = batch.ids.to(preset.device), batch.weights.to(preset.device)[:, 1:]
    with torch.autocast(preset.device, torch.bfloat16, enabled=preset.autocast):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view_as(weights)
    full = weights == 1.0
    return (losses * weights).sum() / weights.sum(), (
        losses.detach() * full
    ).sum() / full.sum().clamp(min=1)


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW; decay on matrices only, and slow steps for the copying circuit."""
    slow = gentle(model)
    groups = []
    for decay in (0.1, 0.0):
        for scale in (GENTLE_SCALE, 1.0):
            chosen = [
                p
                for p in model.parameters()
                if (p.dim() > 1) == (decay > 0) and (id(p) in slow) == (scale < 1.0)
            ]
            groups.append({"params": chosen, "weight_decay": decay, "scale": scale})
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95), fused=True)


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bfloat16 with tokenizer and generation settings, as vLLM reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    half = type(model)(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    half.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, end],
        pad_token_id=tokenizer.pad_token_id,
    )
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_state(
    path: Path, model: PreTrainedModel, optimizer: torch.optim.AdamW, progress: Progress
) -> None:
    """Write everything `--resume` needs, atomically."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def train(group: Group, preset: Preset, minutes: float, out: Path, seed: int, resume: bool) -> None:
    """Run training until `minutes` of it, those of a resumed run included, have passed."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(preset.config())
    prepare(model)
    model.to(preset.device)
    optimizer = make_optimizer(model)
    progress = Progress()
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    if resume:
        state = torch.load(out / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(**state["progress"])
    # Other data for each process, and for a resumed run other than what it began with.
    maker = BatchMaker(tokenizer, (seed + progress.steps) * group.size + group.rank)
    leader = group.rank == 0

    before, began = progress.seconds, time.monotonic()
    exported = began
    smooth, smooth_full = 0.0, 0.0
    bar = tqdm(
        total=round(minutes * 60),
        initial=round(before),
        unit="s",
        mininterval=5.0,
        disable=not leader,
    )
    with open(out / "log.jsonl", "a", encoding="utf-8") as log:
        while (share := progress.seconds / (minutes * 60)) < 1.0:
            length = sequence_length(preset, share)
            rows = max(1, preset.tokens_per_step // length // group.size)
            batch = maker.draw(rows, length, difficulty(share), TASK_SHARE)
            for parameters in optimizer.param_groups:
                parameters["lr"] = parameters["scale"] * learning_rate(preset, progress, share)
            loss, full = weighted_loss(model, batch, preset)
            loss.backward()
            elapsed = before + time.monotonic() - began
            progress.seconds, loss_value, full_value = group.average(
                list(model.parameters()), [elapsed, loss.item(), full.item()]
            )
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            progress.steps += 1
            progress.tokens += rows * length * group.size
            keep = min(0.98, 1 - 1 / progress.steps)
            smooth = keep * smooth + (1 - keep) * loss_value
            smooth_full = keep * smooth_full + (1 - keep) * full_value
            bar.update(round(progress.seconds) - bar.n)
            bar.set_postfix(step=progress.steps, loss=f"{smooth:.3f}", length=length, refresh=False)
            if leader and progress.steps % 20 == 0:
                record = {
                    **asdict(progress),
                    "loss": smooth,
                    "full_loss": smooth_full,
                    "length": length,
                }
                log.write(json.dumps(record) + "\n")
                log.flush()
            if leader and time.monotonic() - exported > EXPORT_EVERY_SECONDS:
                export(model, tokenizer, out / "model")
                save_state(out / "state.pt", model, optimizer, progress)
                exported = time.monotonic()
    bar.close()
    if not leader:
        return
    export(model, tokenizer, out / "model")
    save_state(out / "state.pt", model, optimizer, progress)
    print(json.dumps({**asdict(progress), "loss": smooth, "full_loss": smooth_full}))


def run_process(rank: int, address: str, arguments: argparse.Namespace) -> None:
    """Body of one of the `--workers` processes."""
    torch.set_num_threads(arguments.threads)
    group = Group(rank, arguments.workers, address)
    preset = PRESETS[arguments.preset]
    train(group, preset, arguments.minutes, arguments.out, arguments.seed, arguments.resume)
    group.close()


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu-standin")
    parser.add_argument("--minutes", type=float, default=50.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--workers", type=int, default=2, help="processes; 1 on a GPU")
    arguments = parser.parse_args()
    if not arguments.resume:
        vocab_size = PRESETS[arguments.preset].vocab_size
        train_tokenizer(vocab_size).save_pretrained(arguments.out / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    if arguments.workers == 1:
        run_process(0, address, arguments)
    else:
        multiprocessing.spawn(run_process, (address, arguments), nprocs=arguments.workers)


if __name__ == "__main__":
    main()
