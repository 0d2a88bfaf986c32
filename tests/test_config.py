"""Configuration: presets, sizes, and one clear line for everything wrong."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvtc_vllm.cli import main
from kvtc_vllm.config import (
    ConfigError,
    describe,
    kv_transfer_config,
    load_config,
    parse_bytes,
    preset_names,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(1234, 1234), ("8GiB", 8 << 30), ("1.5 GB", 1_500_000_000), ("64kib", 65536), ("7", 7)],
)
def test_sizes(text: int | str, expected: int) -> None:
    assert parse_bytes("memory_bytes", text) == expected


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_prints_exact_json(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", name]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["kv_connector"] == "KVTCConnector"
    assert printed["kv_role"] == "kv_both"
    assert load_config(printed["kv_connector_extra_config"]) == load_config({"preset": name})


def test_given_keys_override_the_preset() -> None:
    config = load_config({"preset": "kvtc-16x", "memory_bytes": "1MiB"})
    assert (config.target_ratio, config.memory_capacity) == (16, 1 << 20)
    assert kv_transfer_config({"preset": "raw"})["kv_connector_extra_config"]["codec"] == "raw"


def test_a_quality_takes_the_place_of_a_presets_ratio() -> None:
    config = load_config({"preset": "kvtc-16x", "quality": 0.002})
    assert (config.ratio, config.quality) == (None, 0.002)
    with pytest.raises(ConfigError, match="contradict each other"):
        load_config({"preset": "kvtc-16x", "quality": 0.002, "ratio": 16})


def test_defaults_depend_on_the_codec() -> None:
    assert load_config({}).window == 128
    assert load_config({}).target_ratio == 16
    assert load_config({"codec": "raw"}).window == 0
    assert load_config({"codec": "raw", "recent_window": 64}).window == 64


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"preset": "kvtc-99x"}, ["preset", "kvtc-99x", "kvtc-16x", "raw"]),
        ({"ration": 16}, ["ration", "allowed", "ratio", "memory_bytes"]),
        ({"codec": "zip"}, ["codec", "zip"]),
        ({"codec": "raw", "ratio": 8}, ["ratio=8", "contradicts", "raw"]),
        ({"codec": "raw", "artifact": "x"}, ["artifact", "contradicts"]),
        ({"codec": "raw", "quality": 0.002}, ["quality=0.002", "contradicts", "raw"]),
        ({"disk_bytes": "1TiB"}, ["disk_bytes='1TiB'", "disk_path is not set"]),
        ({"disk_write": "behind"}, ["disk_write='behind'", "disk_path is not set"]),
        ({"disk_min_free": 0}, ["disk_min_free=0", "disk_path is not set"]),
        ({"disk_threads": 8}, ["disk_threads=8", "disk_path is not set"]),
        ({"ratio": 8, "quality": 0.002}, ["ratio=8", "quality=0.002", "remove either"]),
        ({"quality": 0}, ["quality=0", "above 0"]),
        ({"artifact": "x", "registry": ["y"]}, ["artifact", "registry"]),
        ({"ratio": 0.5}, ["ratio=0.5", "above 1"]),
        ({"memory_bytes": "lots"}, ["memory_bytes='lots'", "8GiB"]),
        ({"memory_bytes": 0}, ["memory_bytes=0", "out of range"]),
        ({"chunk_tokens": 0}, ["chunk_tokens=0", "1 to 4096"]),
        ({"deflate_level": 9}, ["deflate_level=9", "0 to 3"]),
        ({"encode_threads": "two"}, ["encode_threads", "int"]),
        ({"eviction": "fifo"}, ["eviction", "fifo"]),
        ({"store_policy": "lazy"}, ["store_policy='lazy'", "eager, on_evict"]),
        ({"store_policy": "on_evict", "store_horizon": -1}, ["store_horizon=-1", "0 to 1048576"]),
        ({"store_policy": "eager", "exclusive": True}, ["exclusive=True", "eager", "on_evict"]),
    ],
)
def test_bad_configuration_is_one_clear_line(extra: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(extra)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def deep(levels: int) -> object:
    value: object = "kvtc-16x"
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"memory_bytes": "9" * 400}, ["memory_bytes='99", "is not a size"]),
        ({"memory_bytes": "9" * 30}, ["memory_bytes='99", "out of range", "1PiB"]),
        ({"memory_bytes": 10**5000}, ["memory_bytes", "out of range", "1PiB"]),
        ({"disk_bytes": "1" * 2_000_000}, ["disk_bytes", "is not a size"]),
        ({"preset": deep(100_000)}, ["preset", "kvtc-16x"]),
        ({"chunk_tokens": deep(100_000)}, ["chunk_tokens", "int"]),
        ({"preset": "x" * 100_000}, ["preset", "kvtc-16x"]),
        ({"y" * 100_000: 1}, ["unknown key", "memory_bytes"]),
        ({7: 1}, ["unknown key 7", "memory_bytes"]),
        (None, ["kv_connector_extra_config", "None", "object"]),
        ("kvtc-16x", ["kv_connector_extra_config", "kvtc-16x", "object"]),
        ({"disk_path": "/tmp/a\0b"}, ["disk_path", "NUL"]),
        ({"disk_path": "~nosuchuser/kvtc"}, ["disk_path", "~nosuchuser"]),
        ({"disk_path": "/tmp/\ud800"}, ["disk_path", "ud800"]),
        ({"disk_path": ""}, ["disk_path=''", "absolute"]),
        ({"disk_path": "cache/kvtc"}, ["disk_path='cache/kvtc'", "absolute"]),
        ({"ratio": float("inf")}, ["ratio=inf", "above 1"]),
        ({"ratio": float("nan")}, ["ratio=nan", "above 1"]),
        ({"load_deadline": float("nan")}, ["load_deadline=nan", "0.01 to 600"]),
    ],
    ids=lambda value: ascii(value)[:40] if isinstance(value, str) else None,
)
def test_hostile_configuration_is_one_short_line(extra: Any, words: list[str]) -> None:
    for build in (load_config, kv_transfer_config):
        with pytest.raises(ConfigError) as caught:
            build(extra)
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) < 800
        for word in words:
            assert word in message


HOSTILE_VALUES = (
    None, "", 0, -1, True, b"x", object(), float("inf"), -float("inf"), float("nan"), 10**400,
    10**6000, "9" * 6000, "1" + " " * 40_000, "1e999", "Infinity", "\0", "\ud800", "/\ud800",
    "~nosuchuser/x", "a" * 5000, "\u0663GiB", "line\nline", "\x1b[2J", [None], ["\ud800"], [""],
    {"a": 1}, set(), deep(100_000),
)  # fmt: skip


@pytest.mark.parametrize("key", [field.name for field in describe()])
def test_a_hostile_value_of_any_key_is_used_or_refused_in_one_line(key: str) -> None:
    """Whatever is used can be: sizes have a number of bytes."""
    refused = 0
    for value in HOSTILE_VALUES:
        try:
            config = load_config({key: value})
        except ConfigError as error:
            refused += 1
            message = str(error)
            assert key in message, message
            assert message.isprintable(), ascii(message)
            assert len(message) < 1000, message[:1000]
        else:
            assert 1 <= config.memory_capacity <= 1 << 50
            assert 1 <= config.disk_capacity <= 1 << 50
            assert (config.staging_capacity or 1) >= 1
    assert refused > len(HOSTILE_VALUES) // 2


@pytest.mark.parametrize("key", ["artifact", "registry"])
@pytest.mark.parametrize("text", ["", "a\0b", "~nosuchuser/x", "/\ud800"])
def test_paths_that_are_none_are_refused(key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=key):
        load_config({key: [text] if key == "registry" else text})


def test_a_size_that_is_mostly_blanks_is_refused_at_once() -> None:
    started = time.process_time()
    with pytest.raises(ConfigError, match="is not a size"):
        parse_bytes("memory_bytes", "1" + " " * 40_000 + "x")
    assert time.process_time() - started < 0.2


def test_a_disk_path_may_start_at_home() -> None:
    assert load_config({"disk_path": "~/kvtc"}).disk_path == "~/kvtc"


def test_cli_prints_the_error_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "nothing"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "nothing" in captured.err
    assert main(["config", "raw", "memory_bytes"]) == 2
    assert "KEY=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["{", "[" * 10_000, "\x00", "a: b: c", "2026-13-45", "9" * 5_000])
def test_cli_refuses_a_value_that_is_no_yaml(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "raw", f"memory_bytes={value}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "memory_bytes is not YAML" in error


def test_described_defaults_and_limits_are_those_that_hold() -> None:
    described = {key.name: key for key in describe()}
    assert described["ratio"].default == f"{load_config({}).target_ratio:g}"
    assert described["recent_window"].default == "128; `raw`: 0"
    assert described["memory_bytes"].values == "1 to 1PiB"
    for name, key in described.items():
        if " to " not in key.values:
            continue
        low, high = key.values.split(" to ")
        for value in (low.split()[-1], high):
            if not low.startswith("above"):
                load_config({"disk_path": "/cache", name: yaml.safe_load(value)})
        with pytest.raises(ConfigError, match=re.escape(key.values)):
            load_config({name: -1})


def test_the_documented_table_of_keys_is_the_described_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config", "--describe"]) == 0
    table = capsys.readouterr().out
    page = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text()
    assert table in page, "replace the table by the output of `kvtc config --describe`"


def test_cli_lists_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    assert capsys.readouterr().out.count("\n") == len(preset_names())
