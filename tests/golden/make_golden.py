"""Write the golden blobs of the current format. Run once per released format, then never again.

    python -m tests.golden.make_golden

Existing files are left alone: a blob that was released is decoded for ever.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvtc_vllm.codec.base import read_section
from kvtc_vllm.codec.container import parse
from tests.golden.formula import GOLDEN

FOLDER = Path(__file__).parent


def main() -> None:
    for golden in GOLDEN:
        path = FOLDER / f"{golden.name}.kvtc"
        if path.exists():
            print(f"{path.name} exists, left alone")
            continue
        codec = golden.make_codec()
        blob = codec.encode(*golden.make_chunk(), golden.start)
        decoded = codec.decode(blob)
        payloads = {
            f"payload{i}": np.frombuffer(read_section(section, memoryview(blob)), np.uint8)
            for i, section in enumerate(parse(blob).sections)
        }
        path.write_bytes(blob)
        np.savez_compressed(
            path.with_suffix(".npz"),
            k=decoded.k.float().numpy(),
            v=decoded.v.float().numpy(),
            **payloads,
        )
        print(f"{path.name}: {len(blob)} bytes")


if __name__ == "__main__":
    main()
