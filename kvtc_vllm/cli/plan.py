"""Expect hit rates, conversations that fit and bytes per second, before anything is rolled out.

    kvtc plan --model DIR --ratio 16 --memory 64GiB --gpu-cache-tokens 400000 --clients 500
    kvtc plan --model DIR --tp 8 --latent-copies each --ratio 8 --memory 512GiB
    kvtc plan --kv-bytes-per-token 131072 --memory 64GiB --disk 2TiB --clients 2000

Of latents (MLA) one copy is planned for all --tp ranks, as `latent_copies` keeps them; or a copy
per rank, with --latent-copies each.

Traffic is described as for `kvtc bench`. Hit rates are those of LRU in the long run, by Che's
approximation; --simulate holds the finite traffic of `kvtc bench` with the same seed instead, cold
caches included, also with many engines before one remote storage. RATIO is the real one, as
measured, not the target.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec

from kvtc_vllm.cli.bench import add_traffic_arguments, traffic_of
from kvtc_vllm.cli.facts import print_facts
from kvtc_vllm.config import parse_bytes
from kvtc_vllm.load_test.traffic import Traffic
from kvtc_vllm.planning.errors import PlanError
from kvtc_vllm.planning.lookups import Rules
from kvtc_vllm.planning.model_shape import TokenBytes, token_bytes
from kvtc_vllm.planning.plan import Hardware, Plan, plan
from kvtc_vllm.planning.simulation import Fleet, Service, simulate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help="directory with config.json, or that file")
    what.add_argument(
        "--kv-bytes-per-token",
        type=int,
        help="uncompressed, over all ranks; of latents (MLA) one rank's",
    )
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks, for latents")
    parser.add_argument(
        "--latent-copies",
        choices=("one", "each"),
        help="of a model with latents: one copy for all ranks (default), or each its own",
    )
    parser.add_argument("--ratio", type=float, default=1.0, help="bytes of KV over bytes stored")
    parser.add_argument("--memory", default="4GiB", help="memory tier, such as 64GiB")
    parser.add_argument("--disk", default="0", help="disk tier, 0: none")
    parser.add_argument("--gpu-cache-tokens", type=int, default=0, help="as vLLM logs at start")
    parser.add_argument("--clients", type=int, default=8, help="users at once")
    parser.add_argument("--prefill-rate", type=float, default=10_000.0, help="tokens per second")
    parser.add_argument(
        "--decode-rate", type=float, default=50.0, help="tokens per second of one answer"
    )
    parser.add_argument(
        "--codec-rate", default="10GB", help="KV bytes decoded per second, by all ranks"
    )
    parser.add_argument("--disk-rate", default="2GB", help="bytes read per second")
    parser.add_argument("--chunk-tokens", type=int, default=128)
    parser.add_argument("--recent-window", type=int, default=128)
    parser.add_argument(
        "--template-tokens", type=int, default=0, help="that a chat template adds per message"
    )
    add_traffic_arguments(parser)
    parser.add_argument("--simulate", action="store_true", help="the finite traffic, cold caches")
    fleet = parser.add_argument_group(
        "fleet, with --simulate; users and traffic are of all engines"
    )
    fleet.add_argument("--engines", type=int, default=1, help="each with tiers of its own")
    fleet.add_argument("--remote", default="0", help="storage behind all of them, as with LMCache")
    fleet.add_argument(
        "--scatter", action="store_true", help="turns go to any engine, not to one per conversation"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of YAML")


def run(args: argparse.Namespace) -> int:
    """Print the plan, or what the simulation counted."""
    if args.chunk_tokens < 1 or args.recent_window < 0 or args.template_tokens < 0:
        raise PlanError(
            "--chunk-tokens must be 1 or more, --recent-window and --template-tokens 0 or more"
        )
    per_token, decoders = _token_bytes(args)
    hardware = Hardware(
        kv_bytes_per_token=per_token,
        decoders=decoders,
        gpu_cache_tokens=args.gpu_cache_tokens,
        memory_bytes=parse_bytes("--memory", args.memory),
        disk_bytes=parse_bytes("--disk", args.disk),
        prefill_rate=args.prefill_rate,
        decode_rate=args.decode_rate,
        codec_rate=parse_bytes("--codec-rate", args.codec_rate),
        disk_rate=parse_bytes("--disk-rate", args.disk_rate),
    )
    traffic = traffic_of(args)
    rules = Rules(args.chunk_tokens, args.recent_window, args.template_tokens)
    found = plan(traffic, rules, hardware, args.clients, args.ratio)
    described: dict[str, Any] = msgspec.to_builtins(found)
    if args.simulate:
        described = _simulated(args, traffic, rules, found)
    elif args.engines != 1:
        raise PlanError(f"--engines is {args.engines}: more than one needs --simulate")
    print_facts(described if args.json else _rounded(described), args.json)
    return 0


def _token_bytes(args: argparse.Namespace) -> tuple[int, int]:
    """Uncompressed bytes of a token in the tiers, and ranks that decode each of them."""
    if args.tp < 1:
        raise PlanError(f"--tp is {args.tp}, 1 or more is right")
    found = TokenBytes(args.kv_bytes_per_token or 0, latent=False)
    if args.model is not None:
        found = token_bytes(args.model)
    elif args.latent_copies is not None or args.tp > 1:
        raise PlanError("--tp and --latent-copies are for --model, whose kind of cache they need")
    if not found.latent:
        if args.latent_copies is not None:
            raise PlanError(f"--latent-copies {args.latent_copies}: the model has no latents (MLA)")
        return found.size, 1  # ranks divide it
    if args.latent_copies == "each":
        return found.size * args.tp, 1
    return found.size, args.tp


def _simulated(
    args: argparse.Namespace, traffic: Traffic, rules: Rules, planned: Plan
) -> dict[str, Any]:
    if args.engines < 1:
        raise PlanError(f"--engines is {args.engines}, 1 or more is right")
    per_token = planned.stored_bytes_per_token
    fleet = Fleet(args.engines, parse_bytes("--remote", args.remote) / per_token, args.scatter)
    service = Service(args.prefill_rate, args.decode_rate)
    capacities = [tier.capacity_tokens for tier in planned.tiers.values()]
    counted = simulate(traffic, rules, service, args.clients, capacities, fleet=fleet)
    names = [*planned.tiers, "remote"]
    return {
        "prompt_tokens": counted.prompt_tokens,
        "hit_tokens": dict(zip(names, counted.hit_tokens, strict=True)),
        "hit_rate": counted.hit_rate,
        "turns_per_second": counted.turns / counted.seconds,
        "remote_bytes_per_second": counted.hit_tokens[-1] * per_token / counted.seconds,
    }


def _rounded(value: Any) -> Any:
    """Four significant digits, for people."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
