"""Every field of vLLM's configuration makes another identity, or is left out for a reason.

Real configurations, made as the engine makes them; no engine starts. Also a program: prints the
digest of a model directory, for the test of another process.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, fields, is_dataclass, make_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from kvtc_vllm.artifact.identity import VOLATILE_KEYS
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.config import load_config
from kvtc_vllm.connector import environment, identity, model_files
from kvtc_vllm.connector.identity import LEFT_OUT, SetupIdentity, setup_identity
from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup
from kvtc_vllm.offload.reach import SlidingWindow
from kvtc_vllm.vllm_cache.compat import vllm_version

pytestmark = pytest.mark.vllm

GROUP = CacheGroup(
    layer_names=("layers.0", "layers.1"),
    block_size=32,
    num_kv_heads=2,
    head_size=64,
    head_size_v=64,
    dtype=torch.float32,
)
GEOMETRY = CacheGeometry((GROUP,), 1)
ROPE = Rope(torch.arange(64.0).reshape(8, 8))
OWN: dict[str, Any] = {"files": "files", "ropes": (ROPE,), "layer_rope": (0, 0)}
OVERRIDES = {"rope_theta_note": 1, "another_note": {"a": {1, 2}, "b": [None, 0.5]}}

ONLY_IN = {
    "0.28": {
        "ModelConfig.enable_return_routed_experts",
        "CacheConfig.user_specified_mamba_block_size",
    },
    "0.32": {
        "VllmConfig.aux_output_config",
        "VllmConfig.logging_config",
        "VllmConfig.watermark_config",
        "ModelConfig.enable_nccl_comm_suspend",
        "ModelConfig.enable_trace_replay",
        "ModelConfig.sleep_mode_offload_cudagraph",
        "ModelConfig.sleep_preserve_parameter_names",
        "CacheConfig.cache_hit_alignment_tokens",
        "CacheConfig.effective_attention_block_size",
        "CacheConfig.hash_block_size",
        "CacheConfig.kv_cache_layout",
        "CacheConfig.prefix_cache_retention_interval",
        "AttentionConfig.sparse_mla_prefill_workspace_factor",
        "LoRAConfig.max_lora_cls_labels",
        "SpeculativeConfig.disable_eagle_block_drop",
    },
}
"""Rows of fields that only one of the two tested releases has."""

FACTS_BY_THEMSELVES = {
    "parallel_config.tensor_parallel_size": "a fact of the connector",
    "parallel_config.pipeline_parallel_size": "a fact of the connector",
    "parallel_config.data_parallel_size": "a fact of the connector where there are several",
    "parallel_config.enable_expert_parallel": "a fact of the connector where it is so",
    "model_config.model": "where files that belong to media are read",
    "speculative_config.draft_model_config.model": "where the draft's files are read",
}
"""Left-out fields that an own fact is made from."""


def engine_config(model: Path, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    settings = {"dtype": "float32", "max_model_len": 512, **options}
    return EngineArgs(model=str(model), **settings).create_engine_config()


def identify(vllm_config: Any, extra: Mapping[str, Any] | None = None, **own: Any) -> SetupIdentity:
    config = load_config(extra or {"codec": "raw"})
    geometry = own.pop("geometry", GEOMETRY)
    return setup_identity(vllm_config, config, geometry, own.pop("rank", 0), **{**OWN, **own})


def digest(vllm_config: Any, **own: Any) -> bytes:
    found = identify(vllm_config, **own)
    assert not found.undigested
    return found.digest()


@pytest.fixture(scope="module")
def plain(reference_model: Path) -> Any:
    return engine_config(reference_model)


@pytest.fixture(scope="module")
def full(reference_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A configuration with as many parts as can be had, a draft model and LoRA among them."""
    draft = copied(reference_model, tmp_path_factory.mktemp("draft") / "draft")
    config = engine_config(
        reference_model,
        enable_lora=True,
        speculative_config={
            "model": str(draft),
            "method": "draft_model",
            "num_speculative_tokens": 2,
        },
    )
    fill(config)
    return config


def fill(config: Any) -> None:
    """Make the parts that are None by default, where they need no argument."""
    for f in fields(config):
        value = getattr(config, f.name)
        for kind in get_args(f.type) if value is None else ():
            if is_dataclass(kind) and isinstance(kind, type):
                try:
                    value = kind()
                except Exception:  # vLLM's own validation: this part has no defaults
                    continue
                object.__setattr__(config, f.name, value)
        if is_dataclass(value) and not identity._is_hf_config(value):
            fill(value)


def copied(model: Path, to: Path, **changes: Any) -> Path:
    """The model at another path, with changes to its configuration."""
    shutil.copytree(model, to)
    settings = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**settings, **changes}))
    return to


def other(value: Any) -> Any:
    """A different value, of the same kind where there is a kind."""
    if isinstance(value, Enum):
        return next(member for member in type(value) if member is not value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}-other"
    if isinstance(value, list | tuple):
        return type(value)([*value, "other"])
    if isinstance(value, set | frozenset):
        return value | {"other"}
    if isinstance(value, torch.dtype):
        return torch.int8
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, Mapping):
        return {**value, "other": 1}
    if is_dataclass(value) and not identity._is_hf_config(value):
        changed = copy.copy(value)
        for f in fields(value):
            if f"parallel_config.{f.name}" not in FACTS_BY_THEMSELVES:
                object.__setattr__(changed, f.name, other(getattr(value, f.name, None)))
        return changed
    return "other"


def leaves(part: Any, path: str = "") -> Iterator[tuple[str, str, bool]]:
    """Dotted path and Class.field of every field that is compared, and whether it is left out."""
    for f in fields(part):
        value, here = getattr(part, f.name), f"{path}{f.name}"
        row = f"{type(part).__name__}.{f.name}"
        left_out = f.name in LEFT_OUT.get(type(part).__name__, {})
        nested = is_dataclass(value) and not identity._is_hf_config(value)
        if nested and not left_out:
            yield from leaves(value, f"{here}.")
        elif here not in FACTS_BY_THEMSELVES:
            yield here, row, left_out


def with_other(config: Any, path: str, change: Callable[[Any], Any] = other) -> Any:
    changed = copy.deepcopy(config)
    *above, name = path.split(".")
    part = changed
    for step in above:
        part = getattr(part, step)
    object.__setattr__(part, name, change(getattr(part, name)))
    return changed


# ------------------------------------------------------------------------- every field


def test_every_field_changes_the_identity_unless_it_is_left_out(full: Any) -> None:
    before = digest(full)
    seen, inside, wrong = set(), set(), []
    for path, row, left_out in leaves(full):
        seen.add(row.partition(".")[0])
        if not left_out:
            inside.add(row)
        changed = identify(with_other(full, path))
        if changed.undigested or (changed.digest() == before) != left_out:
            wrong.append((path, left_out, changed.undigested))
    assert not wrong
    # The matrix is not empty where it matters.
    assert seen >= set(LEFT_OUT)
    assert seen >= {"DeviceConfig", "MambaConfig", "IrOpPriorityConfig", "QuantizationConfigArgs"}
    for row in (
        "ModelConfig.dtype",
        "ModelConfig.quantization",
        "ModelConfig.hf_config",
        "CacheConfig.cache_dtype",
        "CacheConfig.prefix_caching_hash_algo",
        "AttentionConfig.backend",
        "LoadConfig.load_format",
        "LoRAConfig.lora_dtype",
        "MultiModalConfig.mm_processor_kwargs",
        "SpeculativeConfig.method",
        "VllmConfig.additional_config",
    ):
        assert row in inside


def test_every_row_of_the_table_names_a_field_and_a_reason() -> None:
    import vllm.config

    here = {f"{name}.{f.name}" for name in LEFT_OUT for f in fields(getattr(vllm.config, name))}
    rows = {f"{name}.{key}": why for name, of in LEFT_OUT.items() for key, why in of.items()}
    assert all(rows.values())
    release = ".".join(vllm_version().split(".")[:2])
    missing = set(rows) - here
    if release in ONLY_IN:
        (other_release,) = set(ONLY_IN) - {release}
        assert missing == ONLY_IN[other_release]
    else:
        assert missing <= set().union(*ONLY_IN.values())


@pytest.mark.parametrize("which", ["hf_config", "hf_text_config"])
def test_every_key_of_the_models_configuration_changes_the_identity(plain: Any, which: str) -> None:
    config = with_other(plain, f"model_config.{which}", copy.deepcopy)  # not the same object
    before = digest(config)
    keys = getattr(config.model_config, which).to_dict()
    assert {"rope_parameters", "rms_norm_eps", "hidden_act"} <= set(keys)
    for key in sorted(set(keys) - {"model_type"}):  # that one belongs to the class
        changed = copy.deepcopy(config)
        hf_config = getattr(changed.model_config, which)
        hf_config.__dict__[key] = other(getattr(hf_config, key))
        # transformers keeps this one under another name
        if key == "output_attentions":
            hf_config.__dict__["_output_attentions"] = other(hf_config._output_attentions)
        assert (digest(changed) == before) == (key in VOLATILE_KEYS), key


def test_a_configuration_inside_the_models_configuration_counts(plain: Any) -> None:
    """As of a vision model: each part without the keys that say how it was saved."""
    digests = []
    for changes in ({}, {"_name_or_path": "elsewhere"}, {"rms_norm_eps": 0.25}):
        config = copy.deepcopy(plain)
        part = copy.deepcopy(config.model_config.hf_config)
        for key, value in changes.items():
            setattr(part, key, value)
        config.model_config.hf_config.vision_config = part
        digests.append(digest(config))
    assert digests[0] == digests[1] != digests[2]


def test_a_field_of_a_later_release_is_inside(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identify(plain)
    declared = make_dataclass("Later", [("later", int, field(default=0))])
    cls = type(plain.attention_config)
    new = declared.__dataclass_fields__["later"]
    monkeypatch.setitem(cls.__dataclass_fields__, "later", new)
    monkeypatch.setattr(cls, "later", 0, raising=False)
    after = identify(plain)
    assert set(after.facts) - set(before.facts) == {"attention_config.later"}
    changed = copy.deepcopy(plain)
    object.__setattr__(changed.attention_config, "later", 1)
    assert len({before.digest(), after.digest(), digest(changed)}) == 3
    unknown = copy.deepcopy(plain)
    unknown.model_config.hf_config.later_setting = 1
    assert digest(unknown) != after.digest()


def test_the_seed_counts_where_it_makes_weights(plain: Any) -> None:
    assert digest(plain) == digest(with_other(plain, "model_config.seed"))
    dummy = with_other(plain, "load_config.load_format", lambda _: "dummy")
    assert len({digest(c) for c in (plain, dummy, with_other(dummy, "model_config.seed"))}) == 3


def test_the_models_length_counts_where_a_rope_table_is_not_known(plain: Any) -> None:
    longer = with_other(plain, "model_config.max_model_len")
    assert digest(plain) == digest(longer)
    for layer_rope in ((), (0, None)):
        assert digest(plain, layer_rope=layer_rope) != digest(longer, layer_rope=layer_rope)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("VLLM_MARLIN_INPUT_DTYPE", ("int8", "fp8")),
        ("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", ("uniform_random", "normal_routing")),
    ],
)
def test_variables_that_change_the_arithmetic_count(
    plain: Any, monkeypatch: pytest.MonkeyPatch, name: str, values: tuple[str, ...]
) -> None:
    before = identify(plain)
    assert "connector.environment" not in before.facts
    found = {before.digest()}
    for value in values:
        monkeypatch.setenv(name, value)
        found.add(digest(plain))
        # Any of them may hold a credential, now or in a later release.
        assert value not in identify(plain).short_facts()["connector.environment"]
    assert len(found) == 1 + len(values)


@pytest.mark.parametrize("name", [*environment.LEFT_OUT, "VLLM_LOGGING_LEVEL", "VLLM_HOST_IP"])
def test_variables_that_do_not_are_left_out(
    plain: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = digest(plain)
    monkeypatch.setenv(name, "1")
    assert digest(plain) == before


# ----------------------------------------------------------------------- our own facts


OTHER_OF_GROUP = {"model_dtype": torch.int8, "reach": SlidingWindow(8)}
"""Fields of a cache group that have no other value by themselves."""

OWN_CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "codec": {"extra": {"codec": "kvtc"}},
    "chunk size": {"extra": {"codec": "raw", "chunk_tokens": 256}},
    "rank": {"rank": 1},
    "ranks": {"geometry": CacheGeometry((GROUP,), 2)},
    "block hash": {"geometry": CacheGeometry((GROUP,), 1, 16)},
    "another group": {"geometry": CacheGeometry((GROUP, GROUP), 1), "layer_rope": (0, 0, 0, 0)},
    "files": {"files": "other"},
    "artifact": {"artifact": b"artifact"},
    "RoPE table": {"ropes": (Rope(ROPE.cos_sin * 2),)},
    "order of pairs": {"ropes": (Rope(ROPE.cos_sin, neox=False),)},
    "which layer uses which": {"ropes": (ROPE, ROPE), "layer_rope": (0, 1)},
    "scales": {"scales": {"k": torch.tensor([0.5, 1]), "v": torch.tensor([1.0, 1])}},
    "only one ratio": {"only_ratio": 16.0},
    "scales of the other kind": {"scales": {"v": torch.tensor([0.5, 1]), "k": torch.ones(2)}},
    **{
        f"group.{f.name}": {
            "geometry": CacheGeometry(
                (
                    replace(
                        GROUP,
                        **{f.name: OTHER_OF_GROUP.get(f.name, other(getattr(GROUP, f.name)))},
                    ),
                ),
                1,
            ),
            "layer_rope": (0, 0, 0),
        }
        for f in fields(GROUP)
    },
}


def test_every_fact_of_the_connector_changes_the_identity(
    plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {name: digest(plain, **change) for name, change in OWN_CHANGES.items()}
    found["tp"] = digest(with_other(plain, "parallel_config.tensor_parallel_size"))
    found["pp"] = digest(with_other(plain, "parallel_config.pipeline_parallel_size"))
    found["dp"] = digest(with_other(plain, "parallel_config.data_parallel_size"))
    found["ep"] = digest(with_other(plain, "parallel_config.enable_expert_parallel"))
    monkeypatch.setattr(identity, "FORMAT_VERSION", identity.FORMAT_VERSION + 1)
    found["format"] = digest(plain)
    monkeypatch.undo()
    monkeypatch.setenv("PYTHONHASHSEED", "5")
    found["seed of the block hashes"] = digest(plain)
    assert len(set(found.values())) == len(OWN_CHANGES) + 6


def test_what_reads_the_same_chunks_shares_them(plain: Any) -> None:
    """Another plan of the same artifact, other sizes."""
    for extra in ({"ratio": 8}, {"memory_bytes": "1GiB"}, {"deflate_level": 2}):
        assert digest(plain, extra={"codec": "kvtc", **extra}) == digest(
            plain, extra={"codec": "kvtc"}
        )


def test_weights_and_their_generation_are_parts_of_the_digest(plain: Any) -> None:
    found = identify(plain)
    parts = [(b"", b""), (b"a", b""), (b"", b"a"), (b"a", b"b"), (b"ab", b""), (b"", b"ab")]
    assert len({found.digest(*part) for part in parts}) == len(parts)
    assert all(len(found.digest(*part)) == 16 for part in parts)


def test_people_see_short_facts_and_no_secret(plain: Any) -> None:
    config = copy.deepcopy(plain)
    config.load_config.model_loader_extra_config = {"key": "hunter2"}
    found = identify(config)
    short = found.short_facts()
    assert set(short) == set(found.facts)
    assert short["model_config.dtype"] == "torch.float32"
    assert short["model_config.hf_config.rms_norm_eps"] == "1e-06"
    assert len(short["model_config.hf_config.rope_parameters"]) == 8
    assert "hunter2" not in str(short)


def test_a_draft_models_weights_count_and_its_place_does_not(
    reference_model: Path, tmp_path: Path
) -> None:
    def drafted(draft: Path) -> SetupIdentity:
        speculative = {"model": str(draft), "method": "draft_model", "num_speculative_tokens": 2}
        return identify(engine_config(reference_model, speculative_config=speculative))

    one, two, three = (copied(reference_model, tmp_path / name) for name in ("1", "2", "3"))
    weights = bytearray((three / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (three / "model.safetensors").write_bytes(weights)
    found = [drafted(draft) for draft in (one, two, three)]
    assert found[0].digest() == found[1].digest() != found[2].digest()
    config = with_other(
        engine_config(
            reference_model,
            speculative_config={
                "model": str(one),
                "method": "draft_model",
                "num_speculative_tokens": 2,
            },
        ),
        "speculative_config.draft_model_config.model",
    )
    assert identify(config).undigested == ("connector.draft_files",)


def with_media(model: Path) -> Any:
    """As if the model took images."""
    from vllm.config import MultiModalConfig

    config = engine_config(model)
    config.model_config.multimodal_config = MultiModalConfig()
    return config


def test_what_makes_numbers_of_media_counts(
    reference_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (copied(reference_model, tmp_path / name) for name in ("1", "2"))
    for directory, pixels in ((one, 1000), (two, 2000)):
        of_video = {"size": {"longest_edge": pixels}}
        (directory / "video_preprocessor_config.json").write_text(json.dumps(of_video))
    three = copied(one, tmp_path / "3")
    assert digest(engine_config(one)) == digest(engine_config(two))
    assert digest(with_media(one)) == digest(with_media(three)) != digest(with_media(two))
    before = identify(with_media(one))
    monkeypatch.setattr(model_files, "version", lambda name: "0.0")
    assert digest(with_media(one)) != before.digest()
    shutil.rmtree(three)
    config = with_media(one)
    config.model_config.model = str(three)
    assert identify(config).undigested == ("connector.media_files",)


@pytest.mark.parametrize(
    ("place", "undigested"),
    [
        ("modeling.Model", ()),
        (["tokens.Slow", None], ()),
        ("org/other--modeling.Model", ("connector.model_code",)),
        (["tokens.Slow", "org/other--tokens.Fast"], ("connector.model_code",)),
    ],
)
def test_code_of_another_repository_is_nobody_s(
    plain: Any, place: Any, undigested: tuple[str, ...]
) -> None:
    config = copy.deepcopy(plain)
    config.model_config.hf_config.auto_map = {"AutoModelForCausalLM": place}
    assert identify(config).undigested == ()
    config.model_config.trust_remote_code = True
    assert identify(config).undigested == undigested


def test_the_release_of_transformers_counts_where_it_computes(
    reference_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = engine_config(reference_model)
    theirs = engine_config(reference_model, model_impl="transformers")
    before = [digest(config) for config in (plain, theirs)]
    monkeypatch.setattr(model_files, "version", lambda name: "0.0")
    after = [digest(config) for config in (plain, theirs)]
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_media_that_another_engine_encodes_are_nobody_s(plain: Any) -> None:
    from vllm.config import ECTransferConfig

    config = copy.deepcopy(plain)
    for role, undigested in (("ec_producer", ()), ("ec_consumer", ("ec_transfer_config",))):
        config.ec_transfer_config = ECTransferConfig(
            ec_connector="ECExampleConnector", ec_role=role
        )
        assert identify(config).undigested == undigested


# ------------------------------------------------------------- wrong answers of the past


def overriding(theta: float) -> Callable[[Any], Any]:
    def override(hf_config: Any) -> Any:
        # vLLM also calls it with an empty configuration, to see whether it changes the type.
        known = getattr(hf_config, "rope_parameters", {})
        hf_config.rope_parameters = {**known, "rope_theta": theta}
        return hf_config

    return override


def test_functions_that_override_settings_count_by_what_they_do(reference_model: Path) -> None:
    digests = [
        digest(engine_config(reference_model, hf_overrides=overriding(theta)))
        for theta in (10000.0, 5e5, 5e5)
    ]
    assert digests[0] != digests[1] == digests[2]


@pytest.mark.parametrize("change", [{"rms_norm_eps": 0.25}, {"rope_theta": 5e5}])
def test_another_configuration_of_the_same_files_counts(
    reference_model: Path, tmp_path: Path, plain: Any, change: dict[str, Any]
) -> None:
    settings = json.loads((reference_model / "config.json").read_text())
    if "rope_parameters" in settings and "rope_theta" in change:
        change = {"rope_parameters": {**settings["rope_parameters"], **change}}
    path = tmp_path / "settings"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**settings, **change}))
    assert digest(engine_config(reference_model, hf_config_path=str(path))) != digest(plain)
    (path / "config.json").write_text(json.dumps(settings))
    assert digest(engine_config(reference_model, hf_config_path=str(path))) == digest(plain)


class Opaque:
    """Nothing says what it is."""


def local_class() -> type:
    class Local:
        pass

    return Local


@pytest.mark.parametrize("value", [Opaque(), lambda: 1, torch.ones(1), local_class()])
def test_what_cannot_be_digested_is_named_and_shares_nothing(plain: Any, value: Any) -> None:
    config = copy.copy(plain)
    object.__setattr__(config, "additional_config", {"a": 1, "deep": [value]})
    one, two = identify(config), identify(config)
    assert one.undigested == ("additional_config.deep.0",)
    assert one.facts == two.facts
    assert one.digest() == one.digest()
    assert one.digest() != two.digest()


def test_a_value_inside_itself_is_named(plain: Any) -> None:
    config = copy.copy(plain)
    loop: dict[str, Any] = {}
    loop["again"] = loop
    object.__setattr__(config, "additional_config", loop)
    assert identify(config).undigested == ("additional_config.again",)


def test_a_class_and_a_data_type_have_a_text(plain: Any) -> None:
    texts = set()
    for value in (Opaque, torch.int8, torch.device("meta"), Path("x"), b"x", 1.5, {1, "x"}):
        config = copy.copy(plain)
        object.__setattr__(config, "additional_config", {"value": value})
        found = identify(config)
        assert not found.undigested
        texts.add(found.facts["additional_config"])
    assert len(texts) == 7


# ----------------------------------------------------------------- another path, process


def test_another_path_another_process_and_another_order_make_no_difference(
    reference_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each process then has hashes, and so an order of sets, of its own.
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    moved = copied(reference_model, tmp_path / "elsewhere")
    settings = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(dict(reversed(settings.items()))))
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), str(moved), "reversed"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    here = digest(engine_config(reference_model, hf_overrides=OVERRIDES))
    assert done.stdout.split()[-1] == here.hex()


if __name__ == "__main__":
    overrides = dict(reversed(OVERRIDES.items()))
    print(digest(engine_config(Path(sys.argv[1]), hf_overrides=overrides)).hex())
