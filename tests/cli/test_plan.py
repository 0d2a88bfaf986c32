"""`kvtc plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvtc_vllm.cli import main

SMALL = ["plan", "--kv-bytes-per-token", "1000", "--memory", "10MB", "--prefix-tokens", "0"]


def planned(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, object]:
    assert main([*SMALL, *more]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_bytes_of_a_model_are_those_of_its_shape(
    reference_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "hidden_size": 4096,
                "torch_dtype": "bfloat16",
            }
        )
    )
    assert main(["plan", "--model", str(tmp_path), "--ratio", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kv_bytes_per_token"] == 131072  # Llama 3.1 8B
    assert found["stored_bytes_per_token"] == 8192
    assert found["tiers"]["memory"]["capacity_tokens"] == 4 * 2**30 // 8192
    assert main(["plan", "--model", str(reference_model)]) == 0


LATENTS = {
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "torch_dtype": "bfloat16",
}
"""DeepSeek-V3's."""


def of_latents(
    directory: Path, capsys: pytest.CaptureFixture[str], *more: str, **config: object
) -> dict[str, Any]:
    (directory / "config.json").write_text(json.dumps({**LATENTS, **config}))
    command = ["plan", "--model", str(directory), "--ratio", "8", "--json", *more]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_latents_are_planned_once_or_once_per_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_one = of_latents(tmp_path, capsys)
    assert of_one["kv_bytes_per_token"] == 61 * (512 + 64) * 2
    assert of_one["stored_bytes_per_token"] == 8784
    shared = of_latents(tmp_path, capsys, "--tp", "8")
    each = of_latents(tmp_path, capsys, "--tp", "8", "--latent-copies", "each")
    assert shared["stored_bytes_per_token"] == 8784
    assert each["stored_bytes_per_token"] == 8 * 8784
    tokens = [plan["tiers"]["memory"]["capacity_tokens"] for plan in (shared, each)]
    assert tokens == [4 * 2**30 // 8784, 4 * 2**30 // (8 * 8784)]
    # Every rank decodes all of it, whoever keeps it; a disk is read once per copy.
    assert shared["load_seconds"] == each["load_seconds"] == 8 * of_one["load_seconds"]
    read = [plan["disk_load_seconds"] - plan["load_seconds"] for plan in (shared, each)]
    assert read[1] == pytest.approx(8 * read[0])


def test_latents_have_the_model_s_element_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = of_latents(tmp_path, capsys, torch_dtype="float32")
    assert wide["kv_bytes_per_token"] == 61 * (512 + 64) * 4


def test_ranks_divide_k_and_v(reference_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for tp in ("1", "2"):
        assert main(["plan", "--model", str(reference_model), "--tp", tp, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert main(["plan", "--model", str(reference_model), "--latent-copies", "one"]) == 2
    assert "the model has no latents" in capsys.readouterr().err


def test_a_higher_ratio_holds_more_and_hits_more(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--clients", "50", "--think-seconds", "30"]
    raw, small = (planned(capsys, *more, "--ratio", r)["tiers"] for r in ("1", "16"))
    assert isinstance(raw, dict)
    assert isinstance(small, dict)
    assert small["memory"]["conversations"] == pytest.approx(
        16 * raw["memory"]["conversations"], rel=1e-3
    )
    assert small["memory"]["hit_rate"] > raw["memory"]["hit_rate"] + 0.2
    assert small["memory"]["busy"] < raw["memory"]["busy"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--disk", "1GB", "--disk-rate", "100"], "no: a load takes"),
        (["--disk", "1GB", "--memory", "4GB"], "not needed"),
        (["--disk", "1GB", "--clients", "50"], "yes: it adds"),
        ([], "no disk is planned"),
    ],
)
def test_the_disk_is_judged(
    more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in str(planned(capsys, *more)["disk_verdict"])


def test_the_simulation_is_of_the_finite_traffic(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--simulate", "--conversations", "1", "--turns", "2")
    # The document and two turns of it: whole chunks of what was stored, once.
    assert found["prompt_tokens"] == (1024 + 32) + (1024 + 32 + 64 + 32)
    assert found["hit_tokens"] == {"gpu": 0, "memory": 1024, "remote": 0}


def test_a_fleet_finds_in_the_remote_storage_what_another_engine_computed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    many = [
        "--simulate",
        "--engines",
        "50",
        "--conversations",
        "60",
        "--clients",
        "20",
        "--scatter",
    ]
    alone = planned(capsys, *many)
    behind = planned(capsys, *many, "--remote", "1GB")
    assert alone["hit_rate"] < 0.1 < behind["hit_rate"]  # type: ignore[operator]
    assert behind["remote_bytes_per_second"] > 0 == alone["remote_bytes_per_second"]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kv-bytes-per-token", "0"], "kv_bytes_per_token is 0"),
        (["--kv-bytes-per-token", "9", "--ratio", "0.5"], "ratio is 0.5"),
        (["--kv-bytes-per-token", "9", "--clients", "0"], "clients is 0"),
        (["--kv-bytes-per-token", "9", "--memory", "lots"], "is not a size"),
        (["--kv-bytes-per-token", "9", "--chunk-tokens", "0"], "--chunk-tokens must be"),
        (["--kv-bytes-per-token", "9", "--engines", "3"], "needs --simulate"),
        (["--kv-bytes-per-token", "9", "--engines", "0", "--simulate"], "--engines is 0"),
        (["--kv-bytes-per-token", "9", "--tp", "2"], "are for --model"),
        (["--kv-bytes-per-token", "9", "--latent-copies", "one"], "are for --model"),
        (["--model", "gone", "--tp", "0"], "--tp is 0"),
        (["--model", "gone"], "gone"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"kv_lora_rank": 512}, "no qk_rope_head_dim"),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_topk": 2048}, "index_topk"),
        ({"layer_types": ["sliding_attention"], "sliding_window": 512}, "1 x window 512"),
        ({"torch_dtype": "int7"}, "int7"),
        ({"num_hidden_layers": None}, "no num_hidden_layers"),
        ({"head_dim": -2}, "sizes below 0"),
        ({"num_hidden_layers": 0}, "no layer that keeps anything"),
        ({"layer_types": 5}, "can't be understood"),
        ({"num_key_value_heads": "two"}, "can't be understood"),
        ({"num_attention_heads": 0}, "can't be understood"),
        ({"text_config": []}, "can't be understood"),
    ],
)
def test_other_models_are_named(
    more: dict[str, object], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, **more}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", "--model", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
