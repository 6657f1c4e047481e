"""Style of a text in numbers: sentence and word length, punctuation, function words. Topic words play no part."""

import re

_FUNCTION_WORDS = (
    "a an the this that these those and but or nor so if as than because while of in on at by for with about from to into over up out "
    "not no be been am is are was were has have had do does did will would can could should may might must it its they them their he she "
    "him her his who which what when where how why there here all each every some any none both one only just very too even yet still"
)
FUNCTION_WORDS = tuple(_FUNCTION_WORDS.split())
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_MARKS = {"commas": ",", "semicolons": ";:", "exclamations": "!", "questions": "?", "dashes": "\u2013\u2014", "ellipses": "\u2026"}


def words(text: str) -> list[str]:
    """Return the words in lower case, contractions kept whole."""
    return _WORD.findall(text.lower().replace("\u2019", "'"))


def style_features(text: str) -> dict[str, float]:
    """Return the style of one text: lengths in words and letters, marks and function words as counts per word."""
    found = words(text)
    count = max(len(found), 1)
    sentences = max(len(re.findall(r"[.!?\u2026]+(?=\s|$)", text)), 1)
    features = {
        "words": float(len(found)),
        "words_per_sentence": len(found) / sentences,
        "letters_per_word": sum(map(len, found)) / count,
        "contractions": sum("'" in word for word in found) / count,
    }
    features |= {name: sum(text.count(mark) for mark in marks) / count for name, marks in _MARKS.items()}
    return features | {f"word_{word}": found.count(word) / count for word in FUNCTION_WORDS}
