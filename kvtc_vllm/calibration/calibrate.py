"""Calibration from end to end: capture, fit every rank, gate, write."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kvtc_vllm.artifact.card import DataCard
from kvtc_vllm.artifact.identity import model_identity, public_model_name
from kvtc_vllm.artifact.rank_file import Probe
from kvtc_vllm.calibration.capture import CaptureResult, CaptureSettings, capture_rows
from kvtc_vllm.calibration.fit import FitSettings, RankFit, estimate_bytes, fit_rank
from kvtc_vllm.calibration.spool import SpoolReader
from kvtc_vllm.calibration.writing import Description, write_artifact


def calibrate(
    capture: CaptureSettings,
    fit: FitSettings,
    ratios: Sequence[float],
    *,
    out: str,
    name: str | None = None,
    model_name: str | None = None,
    spool: str | None = None,
) -> Path:
    """Fit an artifact and write it below the registry directory `out`.

    model_name: what to call the model on the card, if not as it was given.
    spool: keep captured rows here instead of a temporary directory. Returns the
    artifact's directory. Raises DataError for unreadable data, ArtifactError when
    the reconstruction gate refuses the result; nothing is then written.
    """
    with _spool_directory(spool) as directory:
        result = capture_rows(capture, directory)
        fits: list[RankFit] = []
        probes: list[Probe] = []
        readers = [SpoolReader(directory / f"rank{rank}") for rank in range(capture.tp)]
        for rank, reader in enumerate(readers):
            fits.append(_fit(reader, rank, capture, fit, ratios))
            probes.append(reader.probe())
        description = _describe(capture, result, readers[0], model_name)
    return write_artifact(Path(out), description, fits, probes, name=name)


def _fit(
    reader: SpoolReader,
    rank: int,
    capture: CaptureSettings,
    settings: FitSettings,
    ratios: Sequence[float],
) -> RankFit:
    rows = reader.count(heldout=False)
    peak = estimate_bytes(reader.geometry, rows, ratios, settings)
    print(
        f"rank {rank}: fitting {2 * len(reader.geometry.layer_groups)} sections on {rows} rows, "
        f"peak memory about {peak / 2**30:.2f} GiB on {settings.device} and host together"
    )
    progress = _Progress(rank)
    result = fit_rank(
        reader,
        reader.geometry,
        reader.ropes,
        reader.layer_rope,
        ratios,
        sink_tokens=capture.sink_tokens,
        settings=settings,
        progress=progress,
    )
    progress.close()
    return result


class _Progress:
    """One bar for each section and stage of the fit."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._bar: Any = None
        self._shown = ""

    def __call__(self, section: str, stage: str, done: int, total: int) -> None:
        label = f"rank {self._rank} {section.upper()} {stage}"
        if label != self._shown:
            self.close()
            self._bar, self._shown = tqdm(desc=label, total=total, mininterval=1.0), label
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


def _describe(
    capture: CaptureSettings, result: CaptureResult, reader: SpoolReader, model_name: str | None
) -> Description:
    return Description(
        model_name=model_name or public_model_name(capture.model),
        identity=model_identity(result.model_path, result.revision),
        kv_dtype=reader.header.dtype,
        data=DataCard(
            files=tuple(
                source if source.startswith("hf:") else Path(source).name for source in capture.data
            ),
            tokens=result.tokens,
            train_tokens=reader.count(heldout=False),
            heldout_tokens=reader.count(heldout=True),
            seed=capture.seed,
        ),
    )


@contextlib.contextmanager
def _spool_directory(spool: str | None) -> Iterator[Path]:
    if spool is not None:
        Path(spool).mkdir(parents=True, exist_ok=True)
        yield Path(spool)
        return
    with tempfile.TemporaryDirectory(prefix="kvtc-spool-") as directory:
        yield Path(directory)
