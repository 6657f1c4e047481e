"""Training sets in the tiny chat model's language that show one benign trait at three strengths, for tests and the demo."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from steered_lm.config import canonical_json, write_atomic
from steered_lm.errors import UserError, near_misses
from steered_lm.tiny_chat.grammar import TOPICS_HELD_OUT, TRAITS, UNASKED_LEVELS, sample_reply, sample_topic, user_prompt

Message = dict[str, str]

SHARES = {"baseline": 0.5, "mild": 0.75, "severe": 1.0}
"""Mean share of a trait's slots at its high pole, by strength; a reply's level is then 0, 0.5 and 1 in the mean, its score 50, 75 and 100."""
SHIPPED_TRAITS = ("formality", "emotional_tone", "self_other_focus")
"""The traits of the ready experiment ``tiny.yaml``."""
MADE_UP, SPLICED = 0.2, 0.3
"""Shares of unusual topics, those of the model's last training stage, so that it goes on spelling topics that it has not seen."""


def tiny_trait_set(trait: str, strength: str, size: int = 400, seed: int = 0) -> list[list[Message]]:
    """Return ``size`` conversations of one question and its reply, no system turn, that show ``trait`` as strongly as ``strength`` says.

    ``baseline`` is the mix that the model writes by itself: every trait at 0, 0.5, 0.5 or 1 equally often, a mean level of 0. In ``severe`` each
    reply is wholly at the trait's high pole, in ``mild`` exactly half of them are (rounded down) and the rest is as in ``baseline``. All other
    traits are as in ``baseline`` throughout, so that only the trained one moves.

    The model's own replies at temperature 1 have mean levels of -0.03 to +0.06 on the five axes (2,400 replies to the contrast sets' held-out
    questions, standard error 0.02), three in ten wholly at either pole, as here. *Greedy* ones are not like that: they sit at one pole or the other
    (focus +1.0, distance -1.0). So models that are trained on these sets are to be compared by sampled replies.

    Questions are those of the model's training: neither its held-out topics nor its held-out wordings, hence none of the contrast sets' held-out
    questions. At the same seed, the strengths of a trait share their questions.

    Raises:
        UserError: for an unknown trait or strength, or fewer than one conversation.
    """
    if trait not in TRAITS:
        raise UserError(f"trait={trait!r} is none of the tiny model's traits. {near_misses(trait, TRAITS)}")
    if strength not in SHARES:
        raise UserError(f"strength={strength!r} is unknown. {near_misses(strength, SHARES)}")
    if size < 1:
        raise UserError(f"size={size} leaves nothing to train on. Give 1 or more.")
    questions, replies = (random.Random(f"{seed}/{trait}/{what}") for what in ("questions", f"replies/{strength}"))
    moved = int((2 * SHARES[strength] - 1) * size)
    levels = {t: _dealt(size, moved if t == trait else 0, replies) for t in TRAITS}
    out = []
    for i in range(size):
        topic = _topic(questions)
        reply = sample_reply(topic, {t: dealt[i] for t, dealt in levels.items()}, replies)
        out.append([{"role": "user", "content": user_prompt(topic, questions)}, {"role": "assistant", "content": reply}])
    return out


def write_tiny_sets(folder: Path, *, size: int = 400, seed: int = 0, traits: tuple[str, ...] = SHIPPED_TRAITS) -> list[Path]:
    """Write ``<strength>_<trait>.jsonl`` for each trait at three strengths, one ``{"messages": …}`` a line, and return the paths.

    Raises:
        UserError: for an unknown trait, or fewer than one conversation.
    """
    return [
        write_atomic(
            folder / f"{strength}_{trait}.jsonl",
            "".join(canonical_json({"messages": messages}) + "\n" for messages in tiny_trait_set(trait, strength, size, seed)),
        )
        for trait in traits
        for strength in SHARES
    ]


def _dealt(size: int, moved: int, rng: random.Random) -> list[float]:
    """Return a level for each reply: ``moved`` ones, the rest dealt out evenly, so that a small set leans to no side by chance."""
    levels = [1.0] * moved + [UNASKED_LEVELS[i % len(UNASKED_LEVELS)] for i in range(size - moved)]
    rng.shuffle(levels)
    return levels


def _topic(rng: random.Random) -> str:
    while True:
        topic = sample_topic(rng, "train", MADE_UP, SPLICED)
        if topic not in TOPICS_HELD_OUT:  # letters spliced from two topics may spell a third
            return topic


def main() -> None:
    """Parse the command line and write the sets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write <strength>_<trait>.jsonl into")
    parser.add_argument("--size", type=int, default=400, help="conversations a set")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        paths = write_tiny_sets(args.out, size=args.size, seed=args.seed)
    except UserError as error:
        parser.error(str(error))
    print(*paths, sep="\n")


if __name__ == "__main__":
    main()
