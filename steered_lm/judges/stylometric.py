"""The offline judge: an authorship model, one persona against the others, on n-grams, trait markers and style."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import scipy
import sklearn
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy.optimize import minimize
from scipy.sparse import csr_matrix, hstack
from scipy.special import expit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

from steered_lm.config import Config, content_hash, file_hash
from steered_lm.errors import JudgeError
from steered_lm.judges.base import EMPTY, SCALE, JudgeRequest, Verdict
from steered_lm.judges.question import Question
from steered_lm.judges.rubric import Kind
from steered_lm.persona import meter
from steered_lm.persona.load import list_personas, load_persona
from steered_lm.persona.schema import Persona
from steered_lm.persona.style import style_features, words

FloatArray = NDArray[np.float64]

VERSION = 1
"""Raised whenever a change of this file changes a verdict."""

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_LEAST_BUILD = 5


class StylometricParams(Config):
    """Settings of the authorship model.

    Attributes:
        min_df: words and n-grams in fewer build utterances than this are unknown; unknown words, mostly topics, are masked as ``*``.
        char_weight: weight of the character n-gram block (TF-IDF, unit norm).
        word_weight: weight of the word n-gram block (TF-IDF, unit norm).
        style_weight: weight of the style block (standardised, clipped at 3, divided by the root of its width).
        trait_weight: weight of the five trait-meter levels (divided by the root of five).
        inverse_penalty: ``C`` of the logistic regression.
        folds: folds of the cross-validated calibration.
        temperature: what the calibrated log-odds are divided by before they become a score.
        tolerated_repetition: share of repeated word pairs up to which a response keeps its whole score.
        ruinous_repetition: share from which on it scores 1; in between its points above 1 shrink linearly.
    """

    min_df: int = Field(default=3, ge=1)
    char_weight: float = Field(default=1.0, ge=0)
    word_weight: float = Field(default=1.0, ge=0)
    style_weight: float = Field(default=0.5, ge=0)
    trait_weight: float = Field(default=1.5, ge=0)
    inverse_penalty: float = Field(default=1.0, gt=0)
    folds: int = Field(default=5, ge=2)
    temperature: float = Field(default=2.0, gt=0)
    tolerated_repetition: float = Field(default=0.3, ge=0, le=1)
    ruinous_repetition: float = Field(default=0.7, ge=0, le=1)

    @model_validator(mode="after")
    def _repetition_in_order(self) -> Self:
        if self.tolerated_repetition >= self.ruinous_repetition:
            raise ValueError("tolerated_repetition must be below ruinous_repetition")
        return self


class HeldOutAUC(NamedTuple):
    """How well the judge tells the persona's own utterances outside the build split from the other personas'.

    ``low`` and ``high`` bound the 95 % bootstrap interval (both classes resampled). Under perfect separation a bootstrap has no width;
    ``low`` is then the exact binomial bound for the smaller class.
    """

    auc: float
    low: float
    high: float
    own: int
    others: int
    resamples: int


class StylometricJudge:
    """Scores persona fit from 1 to 5, offline and deterministically; it sees the response alone.

    A logistic regression separates the persona's build split from the other personas' (classes balanced). Its decision value is
    calibrated by Platt's method on cross-validated values inside the build split, with Platt's smoothed targets and balanced classes,
    so ``p`` is the probability that the persona rather than another one wrote the text, at even odds. The score is
    ``1 + 4 * sigmoid(logit(p) / temperature)``: without the temperature nearly everything short of the persona is a flat 1, and an
    optimiser sees no way up. p = 0.5 is a score of 3 at any temperature. A response that goes round in circles loses its points
    (``StylometricParams.tolerated_repetition``), for a loop of the persona's favourite words is not the persona. The order of words
    beyond pairs is not read: report how many replies are well-formed beside this score.

    Attributes:
        kinds: the kinds of question that it answers.
        held_out_auc: area under the ROC curve on utterances outside the build split, with its interval and counts.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("persona_fit",)
    held_out_auc: HeldOutAUC

    def __init__(self, persona: Persona, others: Sequence[Persona], params: StylometricParams, seed: int) -> None:
        """Fit the judge; use ``for_persona``, which checks its arguments."""
        own, foreign = persona.utterances("build"), [text for other in others for text in other.utterances("build")]
        texts, labels = [*own, *foreign], np.repeat([1, 0], [len(own), len(foreign)])
        self._persona = persona.name
        self._params = params
        self._platt = _fit_platt(_cross_validated(texts, labels, params, seed), labels)
        self._model = _AuthorshipModel.fit(texts, labels, params)
        self._identity = _identity(persona, others, params, seed)
        self.held_out_auc = self._measure_held_out(persona, others, seed)

    @classmethod
    def for_persona(cls, persona: Persona, others: Sequence[Persona], *, seed: int = 0, params: StylometricParams | None = None) -> Self:
        """Return the judge of ``persona`` against ``others`` (the persona itself is left out of them; their order does not matter).

        Raises:
            JudgeError: when no other persona is given or a build split is too small to calibrate on.
        """
        against = sorted((other for other in others if other.name != persona.name), key=lambda other: other.name)
        if not against:
            raise JudgeError(
                f"others holds no persona but {persona.name!r}. The stylometric judge tells a persona from others; pass at least one other."
            )
        for one in (persona, *against):
            if len(one.items("build")) < _LEAST_BUILD:
                raise JudgeError(
                    f"persona {one.name!r} has {len(one.items('build'))} utterances in its build split; at least {_LEAST_BUILD} are needed."
                )
        return cls(persona, against, params or StylometricParams(), seed)

    @classmethod
    def for_question(cls, question: Question, *, seed: int = 0, params: StylometricParams | None = None) -> Self:
        """Return the judge of a question's persona against all others of ours.

        Raises:
            JudgeError: when the question is another one than persona fit, or the judge cannot be fitted.
        """
        if question.kind not in cls.kinds or question.persona is None:
            raise JudgeError(
                f"judge=stylometric answers one kind of question, persona_fit of a persona, not {question.kind!r}. Use a language model."
            )
        return cls.for_persona(question.persona, [load_persona(name) for name in list_personas()], seed=seed, params=params)

    @property
    def name(self) -> str:
        """``stylometric``."""
        return "stylometric"

    @property
    def facts(self) -> dict[str, str]:
        """What a cache notes beside the verdicts, for people."""
        return {"about": self._persona}

    @property
    def identity(self) -> str:
        """Hash over the personas' digests, the parameters, the marker words and the library versions."""
        return self._identity

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Return one verdict a request, in order; a response without a word is missing. The prompt is not looked at."""
        texts = [request.response for request in requests]
        scored = [position for position, text in enumerate(texts) if words(text)]
        odds = dict(zip(scored, self._log_odds([texts[position] for position in scored]), strict=True))
        return [self._verdict(text, odds.get(position)) for position, text in enumerate(texts)]

    def _verdict(self, text: str, log_odds: float | None) -> Verdict:
        if log_odds is None:
            return Verdict(missing="the response has no words" if text.strip() else EMPTY, judge=self.name)
        levels = {trait: "none" if level is None else f"{level:+.2f}" for trait, level in meter.trait_levels(text).items()}
        explanation = f"p({self._persona})={expit(log_odds):.3f}; " + ", ".join(f"{trait} {level}" for trait, level in levels.items())
        repeated = repetition(text)
        tolerated, ruinous = self._params.tolerated_repetition, self._params.ruinous_repetition
        kept = float(np.clip((ruinous - repeated) / (ruinous - tolerated), 0, 1))
        if kept < 1:
            explanation += f"; {repeated:.0%} of its word pairs are repetitions, which keeps {kept:.0%} of the points above 1"
        score = SCALE[0] + (SCALE[1] - SCALE[0]) * kept * float(expit(log_odds / self._params.temperature))
        return Verdict(score=round(score, 6), explanation=explanation, judge=self.name)

    def _log_odds(self, texts: Sequence[str]) -> list[float]:
        slope, offset = self._platt
        return [float(value) for value in slope * self._model.decide(texts) + offset] if texts else []

    def _measure_held_out(self, persona: Persona, others: Sequence[Persona], seed: int) -> HeldOutAUC:
        own = _held_out(persona)
        foreign = [text for other in others for text in _held_out(other)]
        if not own or not foreign:
            raise JudgeError(f"persona {persona.name!r} or the others have no utterances outside the build split, so the judge cannot be checked.")
        return auc_with_interval(self._model.decide(own), self._model.decide(foreign), seed=seed)


def auc_with_interval(own: FloatArray, others: FloatArray, *, seed: int, resamples: int = 2000) -> HeldOutAUC:
    """Return the AUC of decision values ``own [n]`` over ``others [m]`` with a 95 % bootstrap interval; ties count half."""
    wins = (own[:, None] > others[None, :]) + 0.5 * (own[:, None] == others[None, :])
    auc = float(wins.mean())
    generator = np.random.default_rng(seed)
    rows, columns = wins.shape
    drawn_rows = generator.multinomial(rows, np.full(rows, 1 / rows), size=resamples)
    drawn_columns = generator.multinomial(columns, np.full(columns, 1 / columns), size=resamples)
    low, high = np.quantile(((drawn_rows @ wins) * drawn_columns).sum(axis=1) / wins.size, [0.025, 0.975])
    if auc == 1.0:
        low = 0.025 ** (1 / min(rows, columns))
    return HeldOutAUC(auc, float(low), float(high), rows, columns, resamples)


@dataclass(frozen=True)
class _AuthorshipModel:
    """Vectorisers, scaler and regression, fitted together on one set of texts."""

    known: frozenset[str]
    chars: Any
    terms: Any
    scaler: Any
    regression: Any
    params: StylometricParams

    @classmethod
    def fit(cls, texts: Sequence[str], labels: NDArray[np.int64], params: StylometricParams) -> Self:
        document_frequency = Counter(word for text in texts for word in set(words(text)))
        known = frozenset(word for word, count in document_frequency.items() if count >= params.min_df)
        masked = [mask_unknown(text, known) for text in texts]
        settings: dict[str, Any] = {"min_df": params.min_df, "sublinear_tf": True, "lowercase": False}
        chars = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), **settings).fit(masked)
        terms = TfidfVectorizer(token_pattern=r"[\w'*]+|[^\s\w]", ngram_range=(1, 2), **settings).fit(masked)
        scaler = StandardScaler().fit(_style_matrix(texts))
        unfitted = cls(known, chars, terms, scaler, LogisticRegression(C=params.inverse_penalty, class_weight="balanced", max_iter=1000), params)
        unfitted.regression.fit(unfitted.encode(texts), labels)
        return unfitted

    def encode(self, texts: Sequence[str]) -> csr_matrix:
        """Feature matrix ``[texts, features]``."""
        masked = [mask_unknown(text, self.known) for text in texts]
        style = np.clip(self.scaler.transform(_style_matrix(texts)), -3, 3)
        traits = np.array([_shrunk_levels(text) for text in texts])
        blocks = (
            self.params.char_weight * self.chars.transform(masked),
            self.params.word_weight * self.terms.transform(masked),
            csr_matrix(self.params.style_weight * style / np.sqrt(style.shape[1])),
            csr_matrix(self.params.trait_weight * traits / np.sqrt(traits.shape[1])),
        )
        return hstack(blocks).tocsr()

    def decide(self, texts: Sequence[str]) -> FloatArray:
        """Decision values ``[texts]``, positive for the persona."""
        return np.asarray(self.regression.decision_function(self.encode(texts)), dtype=np.float64)


def repetition(text: str) -> float:
    """Return the share of word pairs that occurred before in the same text, 0 to 1."""
    found = words(text)
    pairs = list(pairwise(found))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def mask_unknown(text: str, known: frozenset[str]) -> str:
    """Return the text in lower case with every word that is not known as ``*``, so that topics do not tell personas apart."""
    return _WORD.sub(lambda match: match[0] if match[0] in known else "*", text.lower().replace("\u2019", "'"))


def _style_matrix(texts: Sequence[str]) -> FloatArray:
    return np.array([list(style_features(text).values()) for text in texts], dtype=np.float64)


def _shrunk_levels(text: str) -> list[float]:
    """The five trait levels, each pulled towards 0 by one extra marker: a single word is weak evidence."""
    return [(high - low) / (high + low + 1) for high, low in meter.marker_counts(text).values()]


def _cross_validated(texts: Sequence[str], labels: NDArray[np.int64], params: StylometricParams, seed: int) -> FloatArray:
    """Decision values ``[texts]``, each from a model that has not seen the text."""
    folds = StratifiedKFold(min(params.folds, int(np.bincount(labels).min())), shuffle=True, random_state=seed)
    decisions = np.zeros(len(texts))
    for seen, unseen in folds.split(np.zeros((len(texts), 1)), labels):
        model = _AuthorshipModel.fit([texts[i] for i in seen], labels[seen], params)
        decisions[unseen] = model.decide([texts[i] for i in unseen])
    return decisions


def _fit_platt(decisions: FloatArray, labels: NDArray[np.int64]) -> tuple[float, float]:
    """Slope and offset of calibrated log-odds at even odds: Platt (1999) with his smoothed targets, both classes of equal weight."""
    own, foreign = int(labels.sum()), int(len(labels) - labels.sum())
    targets = np.where(labels == 1, (own + 1) / (own + 2), 1 / (foreign + 2))
    weights = np.where(labels == 1, 0.5 / own, 0.5 / foreign)

    def loss(line: FloatArray) -> float:
        odds = line[0] * decisions + line[1]
        return float(np.sum(weights * (np.logaddexp(0, odds) - targets * odds)))

    slope, offset = minimize(loss, np.array([1.0, 0.0]), method="L-BFGS-B", bounds=((0.0, None), (None, None))).x
    return float(slope), float(offset)


def _held_out(persona: Persona) -> list[str]:
    return [text for split in ("tune", "validate", "test") for text in persona.utterances(split)]


def _identity(persona: Persona, others: Sequence[Persona], params: StylometricParams, seed: int) -> str:
    return content_hash(
        {
            "judge": "stylometric",
            "version": VERSION,
            "persona": persona.digest,
            "others": [other.digest for other in others],
            "params": params.model_dump(),
            "seed": seed,
            "markers": file_hash(Path(meter.__file__).with_name("markers.yaml")),
            "libraries": {"numpy": np.__version__, "scipy": scipy.__version__, "scikit-learn": sklearn.__version__},
        }
    )
