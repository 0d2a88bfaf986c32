"""The GPU benchmarks' own machinery, which has to be right before minutes of a GPU are spent."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import bundle, child, plots
from benchmarks.gpu.closed_loop import tier_counters
from benchmarks.gpu.dummy_model import SMALL, spread_weights, write_artifact, write_model
from kvtc_vllm.artifact import registry
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.codec.registry import open_codec

SCRIPTS = (
    "bundle",
    "codec_stages",
    "interference",
    "plots",
    "raw_copy",
    "recompute",
    "serving",
    "smoke",
    "vllm_smoke",
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.gpu.{name}").main()
    assert ended.value.code == 0
    assert f"benchmarks.gpu.{name}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_prediction_names_what_bounds_it(tmp_path: Path) -> None:
    """In a process of its own: there kernels are compiled, not run."""
    pytest.importorskip("triton", reason="kernels need Triton")
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.gpu.roofline", "tiny", "4", "--layers", "2"]
    command += ["--tokens", "512", "--rounds", "1", "--out", str(out)]
    ended = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads(out.read_text())
    assert [row["gpu"] for row in rows] == ["H100", "H200"]
    for row in rows:
        assert 0 < row["decode_device_ms"] <= row["decode_ms"]
        assert row["decode_bound"] in {"host", *row["stage_ms"]}
        assert row["decode_gbps"] == pytest.approx(
            row["raw_bytes"] / row["decode_ms"] / 1e6, rel=0.05, abs=0.1
        )
    faster, slower = rows[1]["stage_ms"], rows[0]["stage_ms"]
    assert all(faster[stage] <= slower[stage] for stage in slower)


def _rows() -> list[dict[str, Any]]:
    """Rows as the scripts write them, of every bench."""
    codec = {
        "bench": "codec",
        "shape": "llama-3.1-8b",
        "plan": 16.0,
        "layers_per_group": 8,
        "chunk_tokens": 128,
        "load_tokens": 8192,
        "raw_bytes": 1 << 30,
        "stored_bytes": 1 << 26,
        "product_flops": 10**12,
        "encode_ms": 9.0,
        "decode_ms": 7.0,
        "encode_gbps": 100.0,
        "decode_gbps": 150.0,
    }
    stages = dict.fromkeys((*plots.ENCODE_STAGES, *plots.DECODE_STAGES), 1.5)
    served = {"bench": "serving", "model": "llama-8b", "mode": "kvtc-16x", "budget_bytes": 1 << 33}
    turn = {"ttft_mean_s": 0.1, "ttft_p95_s": 0.2, "turns_per_s": 5.0}
    tokens = {"computed_tokens": 10, "prompt_tokens": 100}
    return [
        codec,
        codec | {"load_tokens": 1024},
        codec | {"stage_ms": stages},
        {"bench": "raw_copy", "load_tokens": 8192, "ms": 20.0, "by_block_ms": 30.0, "gbps": 55.0},
        {"bench": "floor", "float16_tflops": 700.0, "device_copy_gbps": 4000.0},
        {"bench": "recompute", "load_tokens": 8192, "ms": 300.0},
        {"bench": "interference", "idle_ms": 10.0, "busy_ms": 11.0},
        {"bench": "vllm_smoke", "backend": "FLASH_ATTN", "check": "reload", "ok": True},
        served | turn | tokens | {"conversations": 2},
        served | turn | tokens | {"conversations": 4},
        served | {"mode": "native", "skipped": "no GPU"},
        served | {"mode": "raw", "error": "status 1"},
    ]


def test_plots_are_drawn_of_all_benches(tmp_path: Path) -> None:
    drawn = plots.draw(_rows(), tmp_path / "plots")
    assert [path.name for path in drawn] == ["codec.png", "load.png", "serving.png"]
    assert all(path.stat().st_size > 1000 for path in drawn)


@pytest.mark.parametrize(
    ("benches", "expected"),
    [
        ((), []),
        (("interference", "vllm_smoke", "floor"), []),
        (("codec",), ["codec.png", "load.png"]),
        (("recompute",), ["load.png"]),
        (("raw_copy", "floor"), ["load.png"]),
        (("serving",), ["serving.png"]),
    ],
)
def test_plots_do_without_missing_benches(
    tmp_path: Path, benches: tuple[str, ...], expected: list[str]
) -> None:
    rows = [row for row in _rows() if row["bench"] in benches]
    assert [path.name for path in plots.draw(rows, tmp_path)] == expected


@pytest.mark.parametrize("codec", ["kvtc", "kvtc2"])
def test_the_synthetic_artifact_is_found_for_its_model(tmp_path: Path, codec: str) -> None:
    model = write_model(tmp_path / "model", SMALL, 1024)
    made = write_artifact(tmp_path / "artifact", model, SMALL, 1024, (8.0, 16.0), 2, codec)
    found = registry.find(
        model_identity(model), tp_size=1, ratio=16.0, model_name="dummy", artifact=made, codec=codec
    )
    artifact, card, probe = load_rank_artifact(found, 0)
    assert artifact.ratios() == (8.0, 16.0)
    assert artifact.geometry.layer_groups == ((0, 2), (2, 4))
    assert card.method == "synthetic"
    # No redundancy, no hope; but codec 2 keeps nearly all columns of rows as short as these.
    least = {"kvtc": 0.3, "kvtc2": 0.02}[codec]
    for section in card.sections:
        assert all(least < error.heldout < 1 for error in section.errors)
    served = open_codec(codec, torch.bfloat16, artifact=artifact, ratio=16.0)
    k, v = probe.k.bfloat16(), probe.v.bfloat16()
    blob = served.encode(k, v, len(k))
    assert 13 < 2 * k.nbytes / len(blob) < 28


def test_spread_weights_keep_variance() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 512, bias=False), torch.nn.RMSNorm(512))
    torch.nn.init.constant_(model[1].weight, 1e-3)
    spread_weights(model)
    assert 0.8 < float(model[0](torch.randn(64, 256)).detach().std()) < 1.2
    assert torch.equal(model[1].weight.data, torch.ones(512))


def test_bundle_unpacks_archives_and_wheels_once(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    with tarfile.open(source / "packed.tar.xz", "w:xz") as packed:
        entry = tarfile.TarInfo("./first/__init__.py")
        entry.size = 4
        packed.addfile(entry, io.BytesIO(b"x=1\n"))
    with zipfile.ZipFile(source / "second-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("second/__init__.py", "x=2\n")
    found = list(bundle.archives([source]))
    assert [bundle.unpack(path, target).split(":")[0] for path in found] == ["unpacked"] * 2
    assert (target / "first" / "__init__.py").read_text() == "x=1\n"
    (target / "second" / "__init__.py").write_text("changed\n")
    assert [bundle.unpack(path, target).split(":")[0] for path in found] == ["already there"] * 2
    assert (target / "second" / "__init__.py").read_text() == "changed\n"
    with pytest.raises(FileNotFoundError):
        list(bundle.archives([tmp_path / "nowhere"]))


SPEAKER = """
import sys, time
from benchmarks.gpu.child import guarded, report
print("said aloud")
report({"n": 1})
def work():
    if sys.argv[1] == "hang":
        time.sleep(60)
    raise ValueError("broke")
sys.exit(0 if sys.argv[1] == "well" else guarded(work, check="work"))
"""


@pytest.mark.parametrize(
    ("how", "rows", "error"),
    [
        ("well", [{"n": 1}], None),
        ("badly", [{"n": 1}, {"check": "work", "error": "ValueError: broke"}], "status 1"),
        ("hang", [{"n": 1}], "out of time"),
    ],
)
def test_rows_of_a_child_come_whatever_becomes_of_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    rows: list[dict[str, Any]],
    error: str | None,
) -> None:
    (tmp_path / "speaker.py").write_text(SPEAKER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{child.ROOT}")
    log = tmp_path / "logs" / "speaker.log"
    got: list[dict[str, Any]] = []
    failure: RuntimeError | None = None
    try:
        got.extend(child.rows_of("speaker", [how], log, 12.0 if how == "hang" else 60.0))
    except RuntimeError as raised:
        failure = raised
    assert got == rows
    assert (failure is None) == (error is None)
    assert error is None or error in str(failure)
    assert "said aloud" in log.read_text()


@pytest.mark.parametrize(
    ("change", "agrees"),
    [
        ({}, True),
        ({"kvtc_loaded_tokens": 256}, False),
        ({"external_prefix_cache_hits": 256}, False),
        ({"kvtc_failed_loads/checksum": 1}, False),
        ({"kvtc_loaded_tokens": 512, "kvtc_resumed_hit_tokens": 128}, True),
    ],
)
def test_reloaded_tokens_count_only_if_all_counters_agree(
    change: dict[str, float], agrees: bool
) -> None:
    before = {"external_prefix_cache_hits": 128.0, "kvtc_hit_tokens": 128.0}
    before |= {"kvtc_loaded_tokens": 128.0}
    after = {name: 512.0 for name in before}
    after |= {"kvtc_tier_capacity_bytes": 1e6, "kvtc_tier_used_bytes": 1e3}
    grown = {
        name: value + 128 if name == "kvtc_loaded_tokens" else value
        for name, value in change.items()
    }
    found = tier_counters({}, before, after | grown)
    assert found["from_tier"] is agrees
    assert found["hit_tokens"] == 384
