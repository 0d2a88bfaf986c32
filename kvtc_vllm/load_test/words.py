"""Text of about so many tokens, made without the server's tokenizer.

The words are short and common: nearly every vocabulary has each as one token, with its space. The
exact number is the server's to tell, in the `usage` of its answer.
"""

from __future__ import annotations

import random

_COMMON = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work government
number night point home water room mother area money story fact month lot right study book
eye job word business issue side kind head house service friend father power hour game line
end member law car city community name president team minute idea kid body information back
parent face others level office door health person art war history party result change
morning reason research girl guy moment air teacher force education good new first last long
great little own other old big high different small large next early young important few
public bad same able open white black hard red low late general full special free clear
strong certain short single common blue dark food light music paper river road sea table tree
"""
WORDS = tuple(_COMMON.split())


def text(tokens: int, *seed: object) -> str:
    """About `tokens` tokens of words. Equal seeds give equal texts, in any process."""
    # A string, because only its seeding is the same in every process and version.
    draw = random.Random(repr(seed))
    return " ".join(draw.choices(WORDS, k=tokens))
