"""A process that answers prompts from a tier which it shares.

    python -m tests.reliability.live.replica MODEL DIRECTORY

Reads a line of JSON for every question, and writes one for every answer, after MARK; vLLM's
log goes to the same place.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.connector.engine import engine, greedy
from tests.reliability.live.stepping import count, raw

MARK = "replica: "


def say(message: dict[str, Any]) -> None:
    print(f"{MARK}{json.dumps(message)}", flush=True)


def main(model: Path, directory: Path) -> None:
    with engine(model, raw(directory)) as llm:
        say({"ready": True})
        for line in sys.stdin:
            question = json.loads(line)
            answers = greedy(llm, question["prompts"], question["tokens"])
            say({"answers": answers, "loaded": count(llm, "loaded_tokens")})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
