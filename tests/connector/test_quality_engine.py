"""`quality` in a live engine. By `make test-joint`: it calibrates the model for codec 2."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvtc_vllm.cli import main
from kvtc_vllm.codec.container import ratio_of
from tests.connector.calibrated import calibrate
from tests.connector.engine import engine, greedy, metrics, texts, worker_arena
from tests.connector.test_joint_delta_engine import TOKENS

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(os.environ.get("KVTC_JOINT") != "1", reason="takes a calibration"),
]

QUALITY = 0.002
RATIOS = (4, 8, 16, 64)


@pytest.fixture(scope="module")
def registry(reference_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an artifact of codec 2 whose card has a measured curve."""
    directory = tmp_path_factory.mktemp("curve")
    options = {"--ratios": ",".join(map(str, RATIOS)), "--quality-curve": ""}
    calibrate(reference_model, directory, 120_000, 1024, options)
    return directory


def test_a_quality_is_served_by_the_plan_that_the_curve_says(
    reference_model: Path, registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (card,) = (json.loads(path.read_text()) for path in registry.glob("*/*/card.json"))
    points = {point["ratio"]: point["kl"] for point in card["curve"]["points"]}
    assert set(points) == set(RATIOS)
    wanted = max(ratio for ratio, kl in points.items() if kl <= QUALITY)
    assert any(kl > QUALITY for kl in points.values())  # else any plan would do

    assert (
        main(
            ["doctor", str(reference_model), "--quality", str(QUALITY), "--registry", str(registry)]
        )
        == 0
    )
    assert f"{QUALITY:g} is {wanted:g}x of " in capsys.readouterr().out

    prompts = texts(reference_model, count=2, tokens=TOKENS)
    extra: dict[str, Any] = {
        "codec": "kvtc2",
        "quality": QUALITY,
        "registry": [str(registry)],
        "memory_bytes": "64MiB",
    }
    with engine(reference_model, extra, max_model_len=1024) as llm:
        greedy(llm, prompts, 1)
        arena = worker_arena()
        keys = list(arena.keys())
        assert keys
        assert {ratio_of(arena.read(key)) for key in keys} == {wanted}
        assert llm.reset_prefix_cache()
        greedy(llm, prompts, 1)
        values = metrics(llm)
    assert values["kvtc_loaded_tokens"] >= len(prompts) * 512
    assert not any(values[name] for name in values if name.startswith("kvtc_failed_loads"))
