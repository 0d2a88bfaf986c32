"""The page of start-up errors: made from the code, complete, flags as a user types them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from kvtc_vllm.config import ConfigError, describe, load_config
from kvtc_vllm.config.keys import key_fields
from kvtc_vllm.lmcache.settings import LMCacheSettings
from tools import errors

SERVING = ("config", "connector", "vllm_cache", "offload", "tiers", "artifact", "codec")


def found() -> list[errors.Refusal]:
    return [one for place in errors.PLACES for one in errors.refusals(place)]


def test_the_page_is_that_of_the_code() -> None:
    assert errors.PATH.read_text() == errors.text(), "run `make reference`"


def test_every_module_that_refuses_is_in_a_place() -> None:
    package = errors.ROOT / "kvtc_vllm"
    known: set[Path] = set()
    for pattern in (pattern for place in errors.PLACES for pattern in place.modules):
        matched = set(package.glob(pattern))
        assert matched, f"{pattern}: no such module"
        known |= matched
    raises = re.compile(r"raise (?:ConfigError|UnsupportedError|ArtifactError)\(")
    # A serving engine imports nothing of the other parts.
    for part in (*SERVING, "lmcache"):
        for path in package.glob(f"{part}/**/*.py"):
            assert path in known or not raises.search(path.read_text()), path


def test_a_message_of_the_program_is_on_the_page() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"disk_path": "here"})
    said = str(caught.value)
    patterns = [
        re.sub(r"<[^>]*>", ".*", re.escape(one.message).replace(r"\<", "<").replace(r"\>", ">"))
        for one in found()
    ]
    assert [p for p in patterns if re.fullmatch(p, said) and p != ".*"]


def test_options_of_vllm_are_named_as_typed() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "engine" / "arg_utils.py").read_text()
    ours = {key.name for key in describe()} | set(key_fields(LMCacheSettings))
    ours.add("kv_connector_extra_config")
    options = set(re.findall(r"^    ([a-z]+(?:_[a-z]+)+):", source, re.MULTILINE)) - ours
    assert {"max_model_len", "kv_cache_dtype"} <= options
    for one in found():
        words = set(re.findall(r"(?<![<\w-])[a-z]+(?:_[a-z]+)+(?![\w>])", one.message))
        assert not words & options, one.message
