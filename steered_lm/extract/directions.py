"""Paired differences to one unit direction, and what can be said of it."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy.stats import binomtest
from torch import Tensor

from steered_lm.errors import VectorsError
from steered_lm.steering.vectors import DirectionStats, Method

METHODS: tuple[Method, ...] = ("svd", "mean_diff", "pca")


class Direction(NamedTuple):
    """A unit direction ``[d_model]`` float32 and the spectrum that it was taken from."""

    vector: Float[Tensor, " d_model"]
    singular_values: Float[Tensor, " k"]


def direction(differences: Float[Tensor, "pairs d_model"], method: Method) -> Direction:
    """Return the direction of a trait from paired differences (positive minus negative activation).

    ``svd``: first right singular vector of the *uncentred* differences, the line through the origin that explains most of them.
    ``mean_diff``: their normalised mean (difference in means; Marks & Tegmark 2023, arXiv:2310.06824).
    ``pca``: first principal component of the *centred* differences (Zou et al. 2023, arXiv:2310.01405, as commonly implemented); it looks at how
    pairs vary around their mean, so it misses a trait that shifts all pairs alike.
    Every sign is aligned with the mean difference.

    Raises:
        VectorsError: for fewer than two pairs, NaN, or differences that are all zero.
    """
    if len(differences) < 2:
        raise VectorsError(f"a direction needs at least 2 contrast pairs, got {len(differences)}. Add pairs, or check why responses came out empty.")
    if not torch.isfinite(differences).all():
        raise VectorsError("the activations hold NaN or infinity. Load the model in float32 or bfloat16 (dtype=…) and build again.")
    data = differences.double()
    mean = data.mean(dim=0)
    centred = data - mean if method == "pca" else data
    _, values, right = torch.linalg.svd(centred, full_matrices=False)
    vector = mean if method == "mean_diff" else right[0]
    size = vector.norm()
    if float(size) == 0.0 or float(values[0]) < 1e-9 * max(1.0, float(data.abs().max())):
        raise VectorsError("the two sides of every contrast pair give the same activations, so there is no direction. Check that pos and neg differ.")
    unit = vector / size
    sign = -1.0 if float(unit @ mean) < 0 else 1.0
    return Direction((sign * unit).float(), values.float())


def side_direction(
    positive: Float[Tensor, "p d_model"], negative: Float[Tensor, "n d_model"], differences: Float[Tensor, "pairs d_model"]
) -> Direction:
    """Return the unit direction from the mean of one side to the mean of the other, which need not be as many.

    Args:
        positive: responses that show the trait.
        negative: responses that do not.
        differences: of some pairs of them, for the spectrum.

    Raises:
        VectorsError: when there are fewer than two differences, one is not finite, or the two means are equal.
    """
    paired = direction(differences, "mean_diff")
    shift = positive.double().mean(dim=0) - negative.double().mean(dim=0)
    size = float(shift.norm())
    if not 0.0 < size < float("inf"):
        raise VectorsError("the two sides have the same mean activation, or one that is not finite, so there is no direction. Check both sides.")
    return Direction((shift / size).float(), paired.singular_values)


def describe(found: Direction, method: Method, build: Float[Tensor, "pairs d_model"], held_out: Float[Tensor, "more d_model"]) -> DirectionStats:
    """Return how well a direction explains the pairs it was built on and separates those it was not."""
    vector = found.vector.double()
    on_build, on_held = build.double() @ vector, held_out.double() @ vector
    right = int((on_held > 0).sum())
    low = binomtest(right, len(on_held), alternative="greater").proportion_ci(0.95).low if len(on_held) else 0.0
    others = {other: float(direction(build, other).vector.double() @ vector) for other in METHODS if other != method}
    deviation = float(on_held.std()) if len(on_held) > 1 else 0.0
    return DirectionStats(
        pairs=len(build),
        held_out_pairs=len(held_out),
        singular_values=tuple(found.singular_values[:16].tolist()),
        explained_variance=float((on_build**2).sum() / (build.double() ** 2).sum()),
        right_side=float((on_build > 0).double().mean()),
        held_out_right_side=right / len(on_held) if len(on_held) else 0.0,
        held_out_low=float(low),
        cosine=others,
        separation=float(on_held.mean()) / deviation if deviation else 0.0,
    )
