"""The fingerprint of a rank artifact: every number that influences encoded bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict

import torch
import xxhash

from kvtc_vllm.codec.artifact import Geometry, SectionBasis, SectionKey, names_of
from kvtc_vllm.codec.sink_rule import SinkRule


def artifact_fingerprint(
    geometry: Geometry,
    sections: Mapping[SectionKey, SectionBasis],
    sink_tokens: int,
    sink_rule: SinkRule | None = None,
) -> bytes:
    """16 bytes: xxh3-128 over geometry, sink tokens, sink rule, means, bases, plans and weights.

    Predicted and held-out errors describe the artifact without changing its
    output and are left out; RoPE tables belong to the run-time identity.
    """
    digest = xxhash.xxh3_128()
    header = asdict(geometry) | {"sink_tokens": sink_tokens}
    if sink_rule is not None:
        header["sink_rule"] = asdict(sink_rule)
    digest.update(json.dumps(header, sort_keys=True).encode())
    for group, name in geometry.section_keys(names_of(sections)):
        section = sections[group, name]
        digest.update(f"{group}{name}{tuple(section.basis.shape)}".encode())
        digest.update(_tensor_bytes(section.mean, torch.float32))
        digest.update(_tensor_bytes(section.basis, torch.float16))
        for ratio in sorted(section.plans):
            digest.update(struct.pack("<d", ratio))
            digest.update(section.plans[ratio].fingerprint_bytes())
        if section.weights is not None:
            digest.update(b"weights")
            digest.update(_tensor_bytes(section.weights, torch.float32))
    return digest.digest()


def _tensor_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> memoryview:
    flat = tensor.detach().cpu().to(dtype).contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
