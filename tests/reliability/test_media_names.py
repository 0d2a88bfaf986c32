"""Images are told apart by what they are, or there is no disk tier."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.renderers.base import BaseRenderer

from kvtc_vllm.vllm_cache.compat import UnsupportedError
from kvtc_vllm.vllm_cache.media import check_media_names


def configuration(processed: float, prefixes: bool, **changes: Any) -> Any:
    media = SimpleNamespace(mm_processor_cache_gb=processed, language_model_only=False)
    return SimpleNamespace(
        model_config=SimpleNamespace(multimodal_config=changes.get("multimodal_config", media)),
        cache_config=SimpleNamespace(enable_prefix_caching=prefixes),
    )


def names(config: Any, image: object) -> list[str | None]:
    """What vLLM calls the one image of the first prompt of a process; None is by its content."""
    renderer = SimpleNamespace(
        model_config=config.model_config, config=config, _validate_mm_uuids=lambda *_: None
    )
    items = SimpleNamespace(get_all_counts=lambda: {"image": 1})
    process: Any = BaseRenderer._process_mm_uuids
    found = process(renderer, {"image": image}, items, {}, "renderer0-mm-1")
    return list(found.get("image", [None]))


@pytest.mark.parametrize(("processed", "prefixes"), [(4, True), (0, True), (4, False)])
def test_images_that_are_hashed_go_on_disk(processed: float, prefixes: bool) -> None:
    config = configuration(processed, prefixes)
    assert names(config, "a cat") == [None]
    check_media_names(config)


def test_images_that_are_numbered_do_not() -> None:
    """The first image of every start has the same name, whatever it shows."""
    config = configuration(0, False)
    assert names(config, "a cat") == names(config, "a dog") != [None]
    with pytest.raises(UnsupportedError, match="--mm-processor-cache-gb 0; remove either"):
        check_media_names(config)


def test_a_model_without_media_has_none_to_name() -> None:
    check_media_names(configuration(0, False, multimodal_config=None))
    text_only = configuration(0, False)
    text_only.model_config.multimodal_config.language_model_only = True
    check_media_names(text_only)
