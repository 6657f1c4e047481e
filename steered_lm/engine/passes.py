"""Passes of a scoring run: which contexts run together under which specs. They are formed once: what is priced is what runs."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from steered_lm.engine.tree import Context, Group, Tokens, group_by_prefix


class Part(NamedTuple):
    """A context as far as some of its specs go.

    Attributes:
        number: of the context.
        context: with its continuations.
        specs: numbers of the specs.
        branches: tokens that its continuations put into a pass: of each all but the last, which nothing is read from.
    """

    number: int
    context: Context
    specs: list[int]
    branches: int

    @property
    def reads(self) -> int:
        """At how many positions a row's scores are read."""
        return 1 + self.branches


class PassShape(NamedTuple):
    """What a pass puts into the model.

    Attributes:
        late: whether nothing before a context's last token is steered.
        prefix: tokens of the common beginning, which have run.
        sequences: contexts.
        rows: contexts times their specs.
        trunk, branches, whole: most tokens after the common beginning that a context, its continuations, and both together have.
        places: positions whose scores over the vocabulary are computed.
    """

    late: bool
    prefix: int
    sequences: int = 0
    rows: int = 0
    trunk: int = 0
    branches: int = 0
    whole: int = 0
    places: int = 0

    @classmethod
    def of(cls, parts: Sequence[Part], prefix: int, *, late: bool) -> "PassShape":
        """Return the shape of a pass over ``parts``."""
        return list(accumulate(parts, cls.plus, initial=cls(late, prefix)))[-1]

    def plus(self, part: Part) -> "PassShape":
        """Return the shape with one more context."""
        trunk = len(part.context.key.tokens) - self.prefix
        return PassShape(
            self.late,
            self.prefix,
            self.sequences + 1,
            self.rows + len(part.specs),
            max(self.trunk, trunk),
            max(self.branches, part.branches),
            max(self.whole, trunk + part.branches),
            self.places + len(part.specs) * part.reads,
        )

    @property
    def forked(self) -> bool:
        """Whether there are more rows than contexts."""
        return self.rows > self.sequences

    @property
    def head(self) -> int:
        """Width of what runs beforehand, once for all specs: contexts that are not steered, but for their last token."""
        return self.trunk - 1 if self.late and self.forked else 0

    @property
    def tail(self) -> int:
        """Width of the rest: once per context up to the fork, once per row above it."""
        return 1 + self.branches if self.late and self.forked else self.whole

    @property
    def columns(self) -> int:
        """Columns that the cache needs."""
        return self.prefix + self.head + self.tail


class Stage(NamedTuple):
    """Contexts that run after the same tokens, and how they are divided into passes.

    Attributes:
        late: whether nothing before a context's last token is steered.
        beginning: tokens that all of the contexts begin with and that run once; empty without.
        specs: numbers of all specs, in ascending order.
        passes: contexts that run together; widest first.
    """

    late: bool
    beginning: Tokens
    specs: list[int]
    passes: list[list[Part]]

    def shape(self, parts: Sequence[Part]) -> PassShape:
        """Return the shape of a pass over ``parts``."""
        return PassShape.of(parts, len(self.beginning), late=self.late)

    def divided(self, fits: Callable[[PassShape], bool]) -> "Stage":
        """Return the stage with passes as full as ``fits`` allows; a context alone is not asked for."""
        passes: list[list[Part]] = []
        shape = empty = self.shape([])
        for part in (part for parts in self.passes for part in parts):
            larger = shape.plus(part)
            if not passes or not fits(larger):
                passes.append([])
                larger = empty.plus(part)
            passes[-1].append(part)
            shape = larger
        return self._replace(passes=passes)

    def halves(self) -> list["Stage"]:
        """Return two stages, each with half of the specs."""
        middle = len(self.specs) // 2
        made = []
        for specs in (self.specs[:middle], self.specs[middle:]):
            parts = [[part._replace(specs=[spec for spec in part.specs if spec in specs]) for part in parts] for parts in self.passes]
            made.append(self._replace(specs=specs, passes=[kept for some in parts if (kept := [part for part in some if part.specs])]))
        return made


def stages(contexts: Sequence[Context], early: Sequence[bool], *, share: bool) -> list[Stage]:
    """Return how contexts are scored, one pass a stage so far: what is steered late first, contexts with a common beginning together.

    Args:
        contexts: what to score.
        early: per spec, whether it steers prompt tokens before the last one.
        share: whether common beginnings may run on their own.
    """
    made: list[Stage] = []
    for late in (True, False):
        parts = [
            Part(number, context, specs, sum(len(tokens) - 1 for tokens in context.continuations))
            for number, context in enumerate(contexts)
            # a response that starts elsewhere may be steered anywhere
            if (specs := [spec for spec in context.specs if (context.key.ordinary and not early[spec]) is late])
        ]
        ordinary = [part for part in parts if part.context.key.ordinary]
        odd = [part for part in parts if not part.context.key.ordinary]
        groups = [(ordinary, group) for group in group_by_prefix([part.context.key.tokens for part in ordinary], share=share)]
        for of, group in [*groups, *([(odd, Group(0, list(range(len(odd)))))] if odd else [])]:
            members = [of[i] for i in group.contexts]
            members.sort(key=lambda part: len(part.context.key.tokens) + part.branches)
            beginning = members[0].context.key.tokens[: group.prefix]
            made.append(Stage(late, beginning, sorted({spec for part in members for spec in part.specs}), [members[::-1]]))
    return made
