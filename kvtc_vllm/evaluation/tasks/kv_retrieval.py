"""One value out of a JSON object of random identifiers (Lost in the Middle, arXiv 2307.03172)."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from kvtc_vllm.evaluation.data.public import Document
from kvtc_vllm.evaluation.tasks.dialogue import DialogueTask, Question


class KeyValueRetrieval(DialogueTask):
    """The first pairs of a record of the data set, of which one is asked for.

    The answer is the value up to its first hyphen, by which values are told apart.
    """

    name = "kv-retrieval"
    description = "a value out of a JSON object of identifiers, by depth (LITM's data)"
    data_set = "kv-retrieval"
    # Neither first, where a small model fails even without compression, nor deeper, since the
    # end of a short object is in the recent window.
    depths = (0.25, 0.5)
    first_size = 8

    def question(
        self, documents: Sequence[Document], rng: random.Random, size: int, depth: float
    ) -> Question:
        records = documents[0].content["ordered_kv_records"][:size]
        asked = int(depth * len(records))
        key, value = records[asked]
        pairs = json.dumps(dict(records), indent=1)
        user = f'Here is a JSON object.\n{pairs}\nWhich value has the key "{key}"?'
        answer = value.partition("-")[0]
        return Question([("user", user)], f'"{key}": "', answer, (documents[0].name,))
