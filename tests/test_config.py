"""Errors of configs: which value, what is allowed, and nothing that only pydantic knows."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from steered_lm.config import Config
from steered_lm.errors import UserError


class Model(Config):
    size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    names: dict[str, float] | list[str] | None = None
    number: int = 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"size": 0}, "size: Input should be greater than or equal to 1, or Input should be 'auto' (got 0)."),
        ({"names": 3}, "names: Input should be a valid dictionary, or Input should be a valid list (got 3)."),
        ({"size": "b", "number": 0.5}, "Input should be 'auto' (got 'b'); number: Input should be a valid integer"),
        ({"sise": 1}, "sise: Extra inputs are not permitted (got 1). Allowed keys: size, names, number."),
    ],
)
def test_the_forms_that_a_value_may_have_are_told_together(given, said):
    with pytest.raises(UserError) as caught:
        Model.parse(given, source="--size")
    assert str(caught.value).startswith("--size is not a valid Model: ")
    assert said in str(caught.value)
