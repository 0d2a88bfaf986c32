"""Every codec of the registry against the contract: a new row inherits it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest

from kvtc_vllm.codec.registry import CODECS
from kvtc_vllm.config import KVTCConfig
from tests.codec.contract import CONTRACT
from tests.codec.int8_codec import INT8_CODECS


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("way", ["fast", "int8", "reference"])
@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
def test_contract(
    name: str, promise: Callable[[str], None], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way != "fast" and CODECS[name].fast is not None:
        other = {"int8": lambda: INT8_CODECS[name], "reference": None}[way]
        monkeypatch.setitem(CODECS, name, replace(CODECS[name], fast=other))
    promise(name)


def test_the_configuration_allows_every_codec_and_no_other() -> None:
    assert set(get_args(get_type_hints(KVTCConfig)["codec"])) == set(CODECS)


def test_names_and_numbers_are_used_once() -> None:
    assert [spec.codec.name for spec in CODECS.values()] == list(CODECS)
    assert len({spec.codec_id for spec in CODECS.values()}) == len(CODECS)
