"""Change any one thing that makes a chunk what it is: nothing is loaded across, for all pairs."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvtc_vllm.calibration.identity import model_identity
from kvtc_vllm.codec.container import FORMAT_VERSION
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.config import ConfigError, load_config
from kvtc_vllm.connector import startup
from kvtc_vllm.connector.geometry import CacheGeometry
from kvtc_vllm.connector.keys import adapter_digest
from kvtc_vllm.tiers.disk import DiskError, DiskStore
from tests.reliability.blobs import blob_of, key_of

GEOMETRY = CacheGeometry(
    layer_names=("layers.0", "layers.1"),
    block_size=32,
    num_kv_heads=2,
    head_size=64,
    head_size_v=64,
    dtype=torch.bfloat16,
    tp_size=2,
)


def rope(base: float) -> Rope:
    angles = torch.outer(torch.arange(16.0), base ** -(torch.arange(0, 32.0) / 32))
    return Rope(torch.cat((angles.cos(), angles.sin()), 1), True)


def fp8_scales(engine: Engine, of_k: float, of_v: float) -> None:
    """An fp8 cache with these scales in every layer."""
    engine.geometry = replace(GEOMETRY, dtype=torch.float8_e4m3fn)
    layer = SimpleNamespace(_k_scale=torch.tensor(of_k), _v_scale=torch.tensor(of_v))
    engine.layers = dict.fromkeys(GEOMETRY.layer_names, layer)


class Engine:
    """All that enters an identity, as an engine that starts would have it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.weights, self.settings = b"weights", {"layers": 2}
        self.model = SimpleNamespace(
            dtype=torch.bfloat16, quantization=None, hf_overrides={}, seed=0, revision=None
        )
        self.cache = SimpleNamespace(
            cache_dtype="auto", block_size=32, prefix_caching_hash_algo="sha256"
        )
        self.load = SimpleNamespace(load_format="auto")
        self.tp_size, self.rank = 2, 0
        self.extra: dict[str, Any] = {"codec": "kvtc"}
        self.geometry = GEOMETRY
        self.artifact, self.ropes = b"artifact", (rope(1e4),)
        self.format = FORMAT_VERSION
        self.layers: dict[str, Any] = {}

    def identity(self, monkeypatch: pytest.MonkeyPatch) -> bytes:
        self.directory.mkdir(exist_ok=True)
        (self.directory / "config.json").write_text(json.dumps(self.settings))
        (self.directory / "model.safetensors").write_bytes(
            (2).to_bytes(8, "little") + b"{}" + self.weights
        )
        monkeypatch.setattr(startup, "FORMAT_VERSION", self.format)
        configuration = SimpleNamespace(
            model_config=self.model,
            cache_config=self.cache,
            load_config=self.load,
            parallel_config=SimpleNamespace(tensor_parallel_size=self.tp_size),
            compilation_config=SimpleNamespace(static_forward_context=self.layers),
        )
        return startup._identity(
            configuration,
            load_config(self.extra),
            self.geometry,
            self.rank,
            model_identity(self.directory).identity,
            self.artifact,
            self.ropes,
        )


CHANGES: dict[str, Callable[[Engine], Any]] = {
    "nothing": lambda e: None,
    "weights (another revision)": lambda e: setattr(e, "weights", b"weighty"),
    "model settings": lambda e: setattr(e, "settings", {"layers": 3}),
    "overridden settings": lambda e: setattr(e.model, "hf_overrides", {"rope_theta": 5e5}),
    "dummy weights": lambda e: setattr(e.load, "load_format", "dummy"),
    "dtype": lambda e: setattr(e.model, "dtype", torch.float16),
    "cache dtype": lambda e: setattr(e.cache, "cache_dtype", "fp8"),
    "fp8 scales": lambda e: fp8_scales(e, 0.5, 1.0),
    "other fp8 scales": lambda e: fp8_scales(e, 1.0, 0.5),
    "quantization": lambda e: setattr(e.model, "quantization", "awq"),
    "block size": lambda e: setattr(e.cache, "block_size", 64),
    "chunk size": lambda e: e.extra.update(chunk_tokens=256),
    "hash algorithm": lambda e: setattr(e.cache, "prefix_caching_hash_algo", "sha256_cbor"),
    "TP size": lambda e: setattr(e, "tp_size", 4),
    "rank": lambda e: setattr(e, "rank", 1),
    "layers": lambda e: setattr(e, "geometry", replace(GEOMETRY, layer_names=("layers.0",))),
    "heads": lambda e: setattr(e, "geometry", replace(GEOMETRY, num_kv_heads=4)),
    "head size": lambda e: setattr(e, "geometry", replace(GEOMETRY, head_size=128)),
    "value head size": lambda e: setattr(e, "geometry", replace(GEOMETRY, head_size_v=128)),
    "artifact (layer groups, bases)": lambda e: setattr(e, "artifact", b"artifice"),
    "RoPE": lambda e: setattr(e, "ropes", (rope(5e5),)),
    "no RoPE": lambda e: setattr(e, "ropes", ()),
    "codec": lambda e: e.extra.update(codec="raw"),
    "format version": lambda e: setattr(e, "format", e.format + 1),
}


@pytest.fixture
def identities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    found = {}
    for number, (name, change) in enumerate(CHANGES.items()):
        made = Engine(tmp_path / str(number))
        change(made)
        found[name] = made.identity(monkeypatch)
    return found


def test_every_change_gives_another_identity(identities: dict[str, bytes]) -> None:
    assert len(set(identities.values())) == len(CHANGES)


def test_an_identity_survives_a_restart_and_a_move(
    identities: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files elsewhere, settings in another order, are the same model."""
    again = Engine(tmp_path / "elsewhere")
    assert again.identity(monkeypatch) == identities["nothing"]
    one, two = Engine(tmp_path / "one"), Engine(tmp_path / "two")
    one.model.hf_overrides = {"a": 1, "b": 2}
    two.model.hf_overrides = {"b": 2, "a": 1}
    assert one.identity(monkeypatch) == two.identity(monkeypatch)


def test_no_pair_of_identities_shares_a_chunk_even_if_files_are_moved(
    identities: dict[str, bytes], tmp_path: Path
) -> None:
    key = key_of(0)
    stores = {
        name: DiskStore(tmp_path / "tier", identity, capacity=2**24, min_free=0)
        for name, identity in identities.items()
    }
    paths = {}
    for name, store in stores.items():
        with pytest.raises(DiskError, match="missing"):
            store.read(key)
        store.write(key, blob_of(key, identities[name], longest=500))
        paths[name] = next((tmp_path / "tier" / identities[name].hex()).glob("??/*.kvtc"))
    originals = {name: path.read_bytes() for name, path in paths.items()}
    pairs = 0
    for ours, theirs in permutations(stores, 2):
        paths[ours].parent.mkdir(exist_ok=True)
        paths[ours].write_bytes(originals[theirs])
        with pytest.raises(DiskError, match="foreign"):
            stores[ours].read(key)
        assert not paths[ours].exists()
        pairs += 1
    assert pairs == len(CHANGES) * (len(CHANGES) - 1)
    for store in stores.values():
        store.close()


def test_two_adapters_of_one_name_share_no_chunk(tmp_path: Path) -> None:
    keys = []
    for weights in (b"one", b"two"):
        path = tmp_path / "adapter"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        (path / "adapter_model.safetensors").write_bytes(weights)
        lora = SimpleNamespace(lora_name="same", lora_int_id=1, lora_path=str(path))
        keys.append(key_of(0) + adapter_digest(SimpleNamespace(lora_request=lora)))
    assert len({*keys, key_of(0)}) == 3
    store = DiskStore(tmp_path / "tier", bytes(16), capacity=2**20, min_free=0)
    store.write(keys[0], blob_of(keys[0], bytes(16)))
    for other in (keys[1], key_of(0)):
        with pytest.raises(DiskError, match="missing"):
            store.read(other)
    store.close()


def test_a_model_that_cannot_be_told_from_others_gets_no_disk(tmp_path: Path) -> None:
    model = SimpleNamespace(model=str(tmp_path / "nowhere"), revision=None)
    assert startup._raw_model_fingerprint(model, load_config({"codec": "raw"})) == model.model
    persistent = load_config({"codec": "raw", "disk_path": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"disk_path=.* needs the model's files"):
        startup._raw_model_fingerprint(copy.copy(model), persistent)
