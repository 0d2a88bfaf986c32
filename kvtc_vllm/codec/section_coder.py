"""The seam between what all transform codecs share and what is one codec's own.

A *section coder* turns the coefficients of one section, K or V of one layer group, into what a
blob stores of them, at one target ratio. It is fitted, lies in the artifact, and is the only
place that knows how coefficients are quantised and entropy coded. Everything around it (sinks,
RoPE, mean and basis, headers) is `kvtc_vllm.codec.frame`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from kvtc_vllm.codec.container import Section
from kvtc_vllm.codec.entropy import BY_CODER_ID, EncodedSection, EntropyCoder
from kvtc_vllm.codec.errors import ArtifactError


@dataclass(frozen=True)
class CodedSection:
    """Coefficients as a blob stores them.

    coder_id: entropy coder, as in the section table. raw_length: bytes of the payload before
    entropy coding.
    """

    coder_id: int
    raw_length: int
    encoded: EncodedSection


class SectionCoder(Protocol):
    """Coefficients of one section <-> its payload, at one target ratio.

    Immutable and pure: any number of threads may call it at once, and equal coefficients give
    equal bytes.
    """

    @property
    def rank(self) -> int:
        """Leading basis columns that it reads, 0 if it stores nothing."""
        ...

    @property
    def expected_error(self) -> float:
        """Relative squared error sum||x-x'||^2 / sum||x-mean||^2 that the fit computed."""
        ...

    @property
    def beyond(self) -> SectionCoder | None:
        """Codes the coefficients after `rank`, of marked tokens alone."""
        ...

    @property
    def total_rank(self) -> int:
        """Leading basis columns that it and `beyond` read."""
        ...

    @property
    def sink_gain(self) -> float:
        """Coefficients of marked tokens are multiplied by it before `encode`; at least 1."""
        ...

    @property
    def coder_ids(self) -> Collection[int]:
        """Numbers of the entropy coders that it reads; a blob with another is refused."""
        ...

    def raw_length(self, tokens: int) -> int:
        """Least bytes of the payload of `tokens` coded tokens, before entropy coding.

        A reader compares it with the section table before anything is decoded.
        """
        ...

    def most_raw_length(self, tokens: int) -> int:
        """Most bytes of it; `raw_length` where the length follows from `tokens`."""
        ...

    def max_bytes(self, tokens: int) -> int:
        """Most bytes that `tokens` coded tokens take in a blob: unit table entries and body."""
        ...

    def encode(self, coefficients: torch.Tensor, entropy: EntropyCoder) -> CodedSection:
        """Quantise and store float32 [T, rank], on any device.

        entropy: the codec's general coder; one with tables of its own uses those instead.
        Raises CodecError if a coefficient can't be stored; NaN is one that can't.
        """
        ...

    def decode(
        self, section: Section, body: memoryview, tokens: int, device: torch.device
    ) -> torch.Tensor:
        """Inverse of `encode`: float32 [tokens, rank] on `device`.

        section: its entry in the section table, whose raw length is `raw_length(tokens)` to
        `most_raw_length(tokens)` and whose coder is one of `coder_ids`. body: its stored bytes.
        Raises ContainerError("entropy") or ContainerError("bounds"), whatever the bytes are, and
        takes no more memory than the section's raw length justifies.
        """
        ...

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What a rank file keeps of it, by names of letters; `CodecSpec.read_coder` reads it."""
        ...

    def fingerprint_bytes(self) -> bytes:
        """Bytes that change whenever anything that influences encoded bytes does."""
        ...


class CoderTensors(Protocol):
    """The tensors of one section coder in a rank file, none of them trusted."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name that was not loaded yet."""
        ...

    def load(
        self, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]
    ) -> torch.Tensor:
        """The tensor that `SectionCoder.tensors` called `name`, finite if it is of floats.

        dtypes: allowed ones as safetensors names them, the right one first. shape: None is any
        length. Raises ArtifactError, naming file and tensor.
        """
        ...

    def error(self, name: str, problem: str) -> ArtifactError:
        """What to raise if the contents of a tensor are wrong; names file and tensor."""
        ...


def read_body(section: Section, body: memoryview, coder: EntropyCoder | None = None) -> bytearray:
    """The payload of a section, of exactly its raw length.

    coder: one with tables of the artifact's, in the place of the general one that the section
    table names. Raises ContainerError("entropy").
    """
    coder = BY_CODER_ID[section.coder_id] if coder is None else coder
    return coder.decode(section.units, body, section.raw_length)
