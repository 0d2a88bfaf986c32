"""KVTC on a model with windows: calibrated, found, tested at start-up, served, inspected."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvtc_vllm.artifact.card import cache_groups, load_card
from kvtc_vllm.artifact.directory import group_directory, load_rank_artifact
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.artifact.registry import find
from kvtc_vllm.cli import main
from kvtc_vllm.codec.errors import ArtifactError
from tests.connector.engine import greedy, metrics, texts
from tests.hybrid.calibrating import calibrate
from tests.hybrid.running import start

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ENGINE = (
    '{"block_size": 32, "max_model_len": 1024, "num_gpu_blocks_override": 1024, '
    '"max_num_batched_tokens": 512, "dtype": "float32"}'
)
RATIOS = {"kvtc": 2.0, "kvtc2": 4.0}
"""Random weights have rows of many directions."""


@pytest.mark.parametrize(
    "codec",
    [
        "kvtc",
        pytest.param(
            "kvtc2",
            marks=pytest.mark.skipif(
                os.environ.get("KVTC_FAMILIES") != "all", reason="make test-families runs it"
            ),
        ),
    ],
)
def test_calibrate_then_serve(
    reference_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], codec: str
) -> None:
    """kvtc2: K and V of the layers of each cache group share a basis."""
    ratio = RATIOS[codec]
    model, out = calibrate("gemma3", reference_model, tmp_path, ratio, ENGINE, codec)

    directory = find(model_identity(model), 1, ratio, model_name="tiny", registries=[out])
    groups = cache_groups(load_card(directory))
    assert [(group.attention, group.layers) for group in groups] == [
        ("full", (5,)),
        ("window 128", (0, 1, 2, 3, 4)),
    ]
    ropes = []
    for number, layers in enumerate((1, 5)):
        artifact, card, _ = load_rank_artifact(group_directory(directory, number), 0)
        assert artifact.geometry.num_layers == layers
        assert card.data.train_tokens > 2000
        ropes.append(artifact.ropes[0].fingerprint())
    assert ropes[0] != ropes[1], "Gemma 3 rotates windows by another base"

    # An engine whose layers are all in one group needs another artifact.
    with pytest.raises(ArtifactError, match=r"calibrated for 2 cache groups .full, 1 layers; wind"):
        find(model_identity(model), 1, ratio, model_name="tiny", registries=[out], groups=())
    capsys.readouterr()
    assert main(["inspect", str(directory)]) == 0
    name = "KV" if codec == "kvtc2" else "K"
    assert f"window 128, rank 0 group 0 {name}\n" in capsys.readouterr().out

    prompts = texts(reference_model, count=2, tokens=650)
    extra = {"codec": codec, "ratio": ratio, "registry": [str(out)], "memory_bytes": "64MiB"}
    with start(model, extra, skip_tokenizer_init=False) as llm:
        greedy(llm, prompts, 8)
        assert llm.reset_prefix_cache()
        greedy(llm, prompts, 8)
        values = metrics(llm)
    # The last 128 tokens are computed: 512 is the last whole block before them.
    assert values["kvtc_hit_tokens"] == values["external_prefix_cache_hits"] == 2 * 512
    assert not any(values[name] for name in values if name.startswith("kvtc_failed_loads"))
    # Of float32 elements twice the ratio is planned; sinks are exact.
    found = values["kvtc_stored_raw_bytes"] / values["kvtc_stored_bytes"]
    assert 1.25 * ratio < found < 3 * ratio
