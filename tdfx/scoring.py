"""What the errors of a network's sites are measured in, and which of their biases are corrected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdfx.decompositions.base import norm_in
from tdfx.decompositions.metric import Metric
from tdfx.decompositions.tied import TiedMetric
from tdfx.errors import PlanError
from tdfx.metrics import LOSS, error_of, form_of, needs_moments
from tdfx.moments import Moments
from tdfx.passes.input_means import InputMeans
from tdfx.passes.shape_prop import TensorMeta
from tdfx.passes.unpack_recurrent import without_biases
from tdfx.records.capture import Capture
from tdfx.records.layer import Site
from tdfx.records.plan import Plan


@dataclass(frozen=True, eq=False)
class Scoring:
    """Metric, moments, and means of the inputs.

    A weight W~ in place of W moves a layer's mean output by (W - W~) m, m the mean of its input; where m is known the
    bias takes it back. A layer without a bias gains one, but for the input weights of recurrent layers without biases.

    Attributes:
        metric: full name.
        moments: None where there is no data.
        means: m by site, (in k k,) float64; empty if biases are not to be corrected.
    """

    metric: str
    moments: Moments | None
    means: Mapping[str, Tensor]

    def obstacle(self, site: Site) -> str | None:
        """Why the metric says nothing of a site, None if it does."""
        known = {} if self.moments is None else self.moments.sites
        missing = {layer.name for layer in site.layers} - known.keys()
        if not needs_moments(self.metric) or not missing:
            return None
        reasons = () if self.moments is None else self.moments.skipped
        return next((entry.reason for entry in reasons if entry.layer in missing), "it has no moments")

    def form(self, site: Site, *, shrink: bool = True) -> Metric | None:
        """What the site's factors are solved in, or without ``shrink`` judged by; None for the Frobenius norm."""
        known = {} if self.moments is None else self.moments.sites
        is_corrected = site.name in self.means
        forms = [
            form_of(self.metric, known.get(layer.name), corrected=is_corrected, shrink=shrink, groups=layer.groups)
            for layer in site.layers
        ]
        uses = [(form, site.is_turned(of)) for form, of in zip(forms, site.layers, strict=True) if form is not None]
        return TiedMetric.of(uses) if len(uses) > 1 else forms[0]

    def chained(self, site: Site) -> Site:
        """The site as its chain has it, with a bias where one is corrected."""
        if site.name not in self.means or site.layer.bias:
            return site
        return Site.of(replace(site.layer, bias=True))

    def bias(self, site: Site, bias: Tensor | None, difference: Tensor) -> Tensor | None:
        """The chain's bias, for the layer's bias and the difference W - W~ of their weights."""
        mean = self.means.get(site.name)
        if mean is None:
            return bias
        groups = site.layer.groups
        shift = (difference.reshape(groups, len(difference) // groups, -1) @ mean.reshape(groups, -1, 1)).flatten()
        return shift if bias is None else bias.detach().double() + shift

    def error(self, weight: Tensor, difference: Tensor, form: Metric | None) -> float:
        """The error, in the metric, of a difference of weights."""
        return error_of(self.metric, norm_in(form, difference), weight, form)


def scoring_of(
    captured: Capture,
    sites: Sequence[Site],
    metas: dict[str, TensorMeta],
    metric: str,
    moments: Moments | None,
    correct: bool,
) -> Scoring:
    """What errors are measured in; means of the inputs from moments, or from BatchNorm where there are none.

    Raises:
        PlanError: the moments are of another model or graph, or lack what the metric needs.
    """
    if moments is None and needs_moments(metric):
        raise PlanError(f"metric {metric} needs moments; make them with tdfx.calibrate, or give calibration data")
    if moments is not None:
        _check_moments(captured, metric, moments)
    if not correct:
        return Scoring(metric, moments, {})
    if moments is None:
        return Scoring(metric, None, InputMeans(_corrected(captured, sites), metas).run(captured.module))
    known = taken_means(moments)
    names = [site.name for site in _corrected(captured, sites) if site.name in known]
    return Scoring(metric, moments, {name: known[name] for name in names})


def scoring_of_stored(
    captured: Capture,
    sites: Sequence[Site],
    metas: dict[str, TensorMeta],
    plan: Plan,
) -> Scoring:
    """For factors that are given: which chains have gained a bias, though nothing is solved."""
    if not plan.corrected:
        return Scoring(plan.metric, None, {})
    corrected = _corrected(captured, sites)
    if plan.moments is None:
        return Scoring(plan.metric, None, InputMeans(corrected, metas).run(captured.module))
    return Scoring(plan.metric, None, {site.name: torch.zeros(0) for site in corrected})


def _corrected(captured: Capture, sites: Sequence[Site]) -> tuple[Site, ...]:
    """Sites whose chains may have a bias."""
    never = without_biases(captured.module)
    return tuple(site for site in sites if site.can_gain_bias and site.name not in never)


def taken_means(moments: Moments) -> dict[str, Tensor]:
    """Means of the inputs that moments hold, in float64."""
    return {name: site.mean.to(torch.float64) for name, site in moments.sites.items()}


def _check_moments(captured: Capture, metric: str, moments: Moments) -> None:
    if (moments.structure, moments.weights) != (captured.structure, captured.weights):
        raise PlanError(
            f"the moments are of another model (fingerprint {moments.weights[:8]}, this model {captured.weights[:8]}); "
            "calibrate this one"
        )
    if moments.trainable != captured.keeps_batch_norm:
        raise PlanError(
            f"the moments were taken with trainable={moments.trainable}, the model was captured with "
            f"trainable={captured.trainable} (capture {captured.tier!r}); use the same for both"
        )
    if metric == LOSS and moments.output is None:
        raise PlanError('metric loss needs moments of the loss; calibrate with metric="loss", or use metric="feature"')
