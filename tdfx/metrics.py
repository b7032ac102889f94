"""Error metrics: what a candidate's error is measured in, and what a planner adds up.

With W the weight unfolded to (out, in k k), D = W - W~, S the covariance of the layer's input and G that of the loss's
gradient at its output:

``weight:absolute`` is ||D||_F, ``weight:relative`` ||D||_F / ||W||_F, ``weight:scaled`` ||D||_F divided by the number
of elements of W.

``feature:absolute`` is sqrt(tr(D S D^T)), the root mean square error of the layer's outputs with its bias corrected;
``feature:relative`` divides it by sqrt(tr(W S W^T)), ``feature:scaled`` by the number of outputs.

``loss`` is tr(G D S D^T) / 2, the second-order growth of the loss where G and S are taken as independent (the
Kronecker-factored Fisher matrix of Martens and Grosse 2015, section 3); proportional to the divergence from the
original's output.

The W of an embedding is its table transposed and S the second moment of its one-hot input, a diagonal: how often each
row is looked up. So ``feature:absolute`` is the root mean square error of the rows as they are looked up. No bias is
corrected, which would move rows of padding away from zero. Of bags S is taken for diagonal too, as if the errors of
different rows in a bag were independent.

The W of a layer in groups is the matrix with the groups' weights in its diagonal blocks. Its ``loss`` counts what two
groups do together, but for depthwise layers, where S between two channels is taken for zero.
"""

from __future__ import annotations

import difflib

import torch
from torch import Tensor

from tdfx.decompositions.base import norm_in
from tdfx.decompositions.metric import Metric
from tdfx.errors import OptionError
from tdfx.moments import Moments, SiteMoments
from tdfx.shrinkage import shrunk

LOSS = "loss"
FORMS = ("absolute", "relative", "scaled")
METRICS = (*(f"{kind}:{form}" for kind in ("weight", "feature") for form in FORMS), LOSS)


def find_metric(name: str | None, moments: Moments | None = None) -> str:
    """The metric's full name; "weight" and "feature" alone mean relative.

    None is the best that there is data for: "loss" with moments of the loss, "feature:relative" with others,
    "weight:relative" without.

    Raises:
        OptionError: for an unknown name, or moments that the metric lacks.
    """
    if name is None:
        if moments is None:
            return "weight:relative"
        return "feature:relative" if moments.output is None else LOSS
    full = f"{name}:relative" if name in ("weight", "feature") else name
    if full not in METRICS:
        near = difflib.get_close_matches(str(name), METRICS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise OptionError(f"unknown metric {name!r}{hint} known metrics: {', '.join(METRICS)}")
    return full


def needs_moments(metric: str) -> bool:
    """Whether the metric looks at inputs."""
    return not metric.startswith("weight")


def form_of(
    metric: str, moments: SiteMoments | None, *, corrected: bool, shrink: bool = True, groups: int = 1
) -> Metric | None:
    """The quadratic form that the factors of a site, in so many groups, are solved in; None for the Frobenius norm.

    Without the bias corrected the mean of the inputs counts as well; that of an embedding never is. Without ``shrink``
    the form is that of the inputs that were seen, with it an estimate for others (``shrinkage``).
    """
    if moments is None or not needs_moments(metric):
        return None
    observations = moments.observations if shrink else None
    covariance, mean = shrunk(moments.in_cov.double(), observations, groups), moments.mean.double()
    if covariance.dim() == 1:
        corrected = True  # nothing is added to what is not centred
    elif shrink and not covariance.any():  # one observation has no spread: as large as the input itself then
        covariance = covariance + mean.square().mean() * torch.eye(covariance.shape[-1], dtype=mean.dtype)
    if not corrected:
        means = mean.reshape(*covariance.shape[:-2], -1)
        covariance = covariance + means[..., :, None] * means[..., None, :]
    out_cov = moments.out_cov if metric == LOSS else None
    return Metric(covariance, None if out_cov is None else shrunk(out_cov.double(), observations, groups), groups)


def error_of(metric: str, norm: float, weight: Tensor, form: Metric | None) -> float:
    """The error in this metric, from the norm in its form; relative to a zero weight it is the norm itself."""
    if metric == LOSS:
        return norm * norm / 2
    if metric.endswith("relative"):
        return norm / (norm_in(form, weight) or 1.0)
    if metric.endswith("absolute"):
        return norm
    return norm / (weight.numel() if form is None else len(weight))


def contribution(metric: str, error: float) -> float:
    """What a candidate adds to the planner's objective: its squared error, or for ``loss`` the error itself."""
    return error if metric == LOSS else error * error
