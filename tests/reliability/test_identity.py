"""Change any one thing that makes a chunk what it is: nothing is loaded across, for all pairs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import make_dataclass, replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.codec.container import FORMAT_VERSION
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.config import ConfigError, load_config
from kvtc_vllm.connector import identity, startup
from kvtc_vllm.connector.scales import find_scales
from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup
from kvtc_vllm.tiers.disk import DiskError, DiskStore
from tests.reliability.blobs import blob_of, key_of

GROUP = CacheGroup(
    layer_names=("layers.0", "layers.1"),
    block_size=32,
    num_kv_heads=2,
    head_size=64,
    head_size_v=64,
    dtype=torch.bfloat16,
)


ModelConfig = make_dataclass(
    "ModelConfig",
    ["model", "revision", "dtype", "quantization", "hf_config", "seed", "trust_remote_code"],
)
"""As vLLM's, by the name of which the identity knows what counts."""


def rope(base: float) -> Rope:
    angles = torch.outer(torch.arange(16.0), base ** -(torch.arange(0, 32.0) / 32))
    return Rope(torch.cat((angles.cos(), angles.sin()), 1), True)


def fp8_scales(engine: Engine, of_k: float, of_v: float) -> None:
    """An fp8 cache with these scales in every layer."""
    engine.group = replace(GROUP, dtype=torch.float8_e4m3fn)
    layer = SimpleNamespace(_k_scale=torch.tensor(of_k), _v_scale=torch.tensor(of_v))
    engine.layers = dict.fromkeys(GROUP.layer_names, layer)


class Engine:
    """All that enters an identity, as an engine that starts would have it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.weights, self.settings = b"weights", {"layers": 2}
        self.model: Any = ModelConfig(
            model=str(directory),
            revision=None,
            dtype=torch.bfloat16,
            quantization=None,
            hf_config={"a": 1, "b": 2},
            seed=0,
            trust_remote_code=True,
        )
        self.cache = SimpleNamespace(
            cache_dtype="auto", block_size=32, prefix_caching_hash_algo="sha256"
        )
        self.load = SimpleNamespace(load_format="auto")
        self.tp_size, self.pp_size, self.rank = 2, 1, 0
        self.extra: dict[str, Any] = {"codec": "kvtc"}
        self.group = GROUP
        self.artifact, self.ropes = b"artifact", (rope(1e4),)
        self.format = FORMAT_VERSION
        self.layers: dict[str, Any] = {}
        self.live_weights, self.generation = b"live", b""
        self.code = b"x = 1"

    def identity(self, monkeypatch: pytest.MonkeyPatch) -> bytes:
        self.directory.mkdir(exist_ok=True)
        (self.directory / "config.json").write_text(json.dumps(self.settings))
        (self.directory / "model.safetensors").write_bytes(
            (2).to_bytes(8, "little") + b"{}" + self.weights
        )
        (self.directory / "modeling.py").write_bytes(self.code)
        monkeypatch.setattr(identity, "FORMAT_VERSION", self.format)
        configuration = SimpleNamespace(
            model_config=self.model,
            cache_config=self.cache,
            load_config=self.load,
            parallel_config=SimpleNamespace(
                tensor_parallel_size=self.tp_size, pipeline_parallel_size=self.pp_size
            ),
        )
        live = SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context=self.layers)
        )
        setup = identity.setup_identity(
            configuration,
            load_config(self.extra),
            CacheGeometry((self.group,), 2),
            self.rank,
            files=model_identity(self.directory).identity,
            artifact=self.artifact,
            ropes=self.ropes,
            layer_rope=tuple(0 if self.ropes else None for _ in self.group.layer_names),
            scales=find_scales(live, self.group),
        )
        assert setup.undigested == ()
        return setup.digest(self.live_weights, self.generation)


CHANGES: dict[str, Callable[[Engine], Any]] = {
    "nothing": lambda e: None,
    "weights (another revision)": lambda e: setattr(e, "weights", b"weighty"),
    "model settings": lambda e: setattr(e, "settings", {"layers": 3}),
    "settings as they are used": lambda e: setattr(e.model, "hf_config", {"rope_theta": 5e5}),
    "code of the model": lambda e: setattr(e, "code", b"x = 2"),
    "weights exchanged while running": lambda e: setattr(e, "live_weights", b"lively"),
    "a reset": lambda e: setattr(e, "generation", b"nonce"),
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
    "pipeline stages": lambda e: setattr(e, "pp_size", 2),
    "rank": lambda e: setattr(e, "rank", 1),
    "layers": lambda e: setattr(e, "group", replace(GROUP, layer_names=("layers.0",))),
    "heads": lambda e: setattr(e, "group", replace(GROUP, num_kv_heads=4)),
    "head size": lambda e: setattr(e, "group", replace(GROUP, head_size=128)),
    "value head size": lambda e: setattr(e, "group", replace(GROUP, head_size_v=128)),
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
    one.model.hf_config = {"a": 1, "b": 2}
    two.model.hf_config = {"b": 2, "a": 1}
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


def test_a_model_that_cannot_be_told_from_others_gets_no_disk(tmp_path: Path) -> None:
    model = SimpleNamespace(model=str(tmp_path / "nowhere"), revision=None)
    assert startup._raw_model_fingerprint(model, load_config({"codec": "raw"})) == model.model
    persistent = load_config({"codec": "raw", "disk_path": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"disk_path=.* needs the model's files"):
        startup._raw_model_fingerprint(copy.copy(model), persistent)


def test_a_set_up_that_cannot_be_told_from_others_gets_no_disk(tmp_path: Path) -> None:
    setup = identity.SetupIdentity({"a": "1"}, ("model_config.hf_config.f",))
    startup.check_digested(setup, load_config({"codec": "raw"}))
    persistent = load_config({"codec": "raw", "disk_path": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"disk_path=.* and model_config\.hf_config\.f can"):
        startup.check_digested(setup, persistent)
    startup.check_digested(identity.SetupIdentity({"a": "1"}), persistent)
