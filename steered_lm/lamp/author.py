"""How well a text fits its author: what a judge is asked, and which of the author's texts it is shown."""

from functools import cache
from importlib.resources import files

import yaml

from steered_lm.errors import JudgeError
from steered_lm.judges.base import JudgeRequest
from steered_lm.judges.question import Question
from steered_lm.judges.rubric import Rubric
from steered_lm.lamp.rows import Row
from steered_lm.lamp.task import LampTask

SHOWN = 24
"""How many of an author's texts a judge is shown at most."""

# what the author wrote themselves; movie tags and scores are no texts, and an abstract is told by its title
_OWN = {"LaMP_1": "abstract", "LaMP_3": "text", "LaMP_4": "title", "LaMP_5": "title", "LaMP_6": "title", "LaMP_7": "text"}


def own_field(task: LampTask) -> str | None:
    """Return the field of a profile's item that its author wrote; None where there is none."""
    return _OWN.get(task.name)


def author_lines(task: LampTask, row: Row) -> tuple[str, ...]:
    """Return texts that the author of a row wrote: at most 24, spread evenly over the profile. The right answer is not among them."""
    field = own_field(task)
    if field is None:
        return ()
    texts = [text for item in row.profile if (text := str(item[field]).strip()) and text != row.output.strip()]
    count = min(SHOWN, len(texts))
    return tuple(texts[place * len(texts) // count] for place in range(count))


@cache
def author_question() -> Question:
    """Return the question how well a text fits its author, 1 to 5; the author's texts are the ``references`` of a request.

    So one judge, with one budget and one cache, serves all authors.
    """
    text = files("steered_lm.lamp").joinpath("author_fit.yaml").read_text(encoding="utf-8")
    return Question(Rubric.parse(yaml.safe_load(text), source="author_fit.yaml", error=JudgeError), about="the author")


def author_request(question: str, answer: str, lines: tuple[str, ...] | list[str]) -> JudgeRequest:
    """Return what the judge is asked about one answer."""
    return JudgeRequest(prompt=question, response=answer.strip(), references=tuple(lines))


def refuse_stylometric(judge: str) -> None:
    """Refuse the judge that has to learn a persona before it can rate.

    Raises:
        JudgeError: for ``stylometric``.
    """
    if judge == "stylometric":
        raise JudgeError(
            "judge='stylometric' learns one persona and cannot rate LaMP's many authors. Use a language model, such as openai:<model> or "
            "hf:<model>; or make a persona of one author (steered-lm persona from-lamp) and evaluate persona_judge with it."
        )
