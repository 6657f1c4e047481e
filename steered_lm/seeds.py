"""Seeds of sampled replies: the same prompt, repeat and seed give the same draws in every harness."""

import hashlib
from random import Random


def repeat_seed(seed: int, repeat: int) -> int:
    """Return the seed of a prompt's reply number ``repeat``, from 0: the first one's is ``seed`` itself, the others' follow from it."""
    return seed if repeat == 0 else Random(f"{seed}/{repeat}").getrandbits(31)


def row_seed(seed: int, tokens: tuple[int, ...], candidate: str | None = None) -> int:
    """Return the seed of a row's own draws: it depends on the row alone, not on the others of the run, and is the same in every harness.

    Args:
        seed: of the run, and of the reply among several (:func:`repeat_seed`).
        tokens: ids of the prompt.
        candidate: name of the steering among several that are evaluated together.
    """
    digest = hashlib.sha256(repr((seed, tokens, candidate, 0)).encode()).digest()  # the 0 keeps the draws of published figures
    return int.from_bytes(digest[:8], "little") >> 1
