"""Configuration: presets, sizes, and one clear line for everything wrong."""

from __future__ import annotations

import json

import pytest

from kvtc_vllm.cli import main
from kvtc_vllm.config import (
    ConfigError,
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
        ({"artifact": "x", "registry": ["y"]}, ["artifact", "registry"]),
        ({"ratio": 0.5}, ["ratio=0.5", "above 1"]),
        ({"memory_bytes": "lots"}, ["memory_bytes='lots'", "8GiB"]),
        ({"memory_bytes": 0}, ["memory_bytes=0", "out of range"]),
        ({"chunk_tokens": 0}, ["chunk_tokens=0", "1 to 4096"]),
        ({"deflate_level": 9}, ["deflate_level=9", "0 to 3"]),
        ({"encode_threads": "two"}, ["encode_threads", "int"]),
        ({"eviction": "fifo"}, ["eviction", "fifo"]),
    ],
)
def test_bad_configuration_is_one_clear_line(extra: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(extra)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_cli_prints_the_error_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "nothing"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "nothing" in captured.err
    assert main(["config", "raw", "memory_bytes"]) == 2
    assert "KEY=VALUE" in capsys.readouterr().err


def test_cli_lists_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    assert capsys.readouterr().out.count("\n") == len(preset_names())
