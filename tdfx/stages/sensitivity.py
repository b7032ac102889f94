"""How much each site loses as it gets cheaper, by method: which layers resist."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tdfx.budget import find_resource
from tdfx.records.candidate import Candidate
from tdfx.records.cost import Cost
from tdfx.records.layer import Site
from tdfx.records.profile import Profile
from tdfx.tables import align
from tdfx.tables import share as percentage

SHARES = (0.75, 0.5, 0.25)
"""Shares of a site's cost that the table looks at."""

RESISTANCE_SHARE = 0.5
COLUMNS = ("site", "method", "resource", "metric", "share", "error")


@dataclass(frozen=True)
class Sensitivity:
    """What one site loses with one method.

    Attributes:
        site: name of the site.
        method: name of a decomposition.
        points: (share of the dense site's cost, error) of every rank on offer, the least share first.
        weight: the dense site's share of the whole model's cost.
        resource: "flops", "macs", "params" or "bytes".
        metric: of the errors.
    """

    site: str
    method: str
    points: tuple[tuple[float, float], ...]
    weight: float
    resource: str
    metric: str

    @property
    def curve(self) -> tuple[tuple[float, float], ...]:
        """The points that are less wrong than all cheaper ones."""
        kept: list[tuple[float, float]] = []
        for share, error in self.points:
            if not kept or error < kept[-1][1]:
                kept.append((share, error))
        return tuple(kept)

    def error_at(self, share: float) -> float:
        """The least error at this share of the dense cost or less; infinite if nothing is as cheap."""
        return min((error for cost, error in self.points if cost <= share), default=math.inf)


def sensitivity(profile: Profile, resource: str = "flops") -> tuple[Sensitivity, ...]:
    """Error against cost of every site and method, from the candidates of a profile; nothing is computed anew.

    Args:
        profile: what ``profile`` returned.
        resource: what cost is: "flops", "macs", "params" or "bytes".

    Returns:
        One record for each site and method, in the profile's order; of sites that cost nothing of the resource none.

    Raises:
        BudgetError: unknown resource.
    """
    amount = find_resource(resource, "resource")
    whole = amount(profile.before)
    found: list[Sensitivity] = []
    for site in profile.sites:
        dense = amount(_dense_cost(site))
        by_method: dict[str, list[Candidate]] = {}
        for candidate in profile.of_site(site.name):
            if not candidate.is_dense and dense:
                by_method.setdefault(candidate.method, []).append(candidate)
        found += [
            Sensitivity(site.name, method, _points(offered, amount, dense), dense / whole, resource, profile.metric)
            for method, offered in by_method.items()
        ]
    return tuple(found)


def by_resistance(records: Iterable[Sensitivity]) -> dict[str, tuple[Sensitivity, ...]]:
    """The records of each site; first the sites that lose most at half their cost, with the best method."""
    sites: dict[str, tuple[Sensitivity, ...]] = {}
    for record in records:
        sites[record.site] = (*sites.get(record.site, ()), record)
    return dict(sorted(sites.items(), key=lambda item: _best(item[1], RESISTANCE_SHARE)[0], reverse=True))


def to_table(records: Sequence[Sensitivity]) -> str:
    """A row for each site: the least error at shares of its cost, and the method that has it; most resistant first."""
    if not records:
        return "nothing to compress"
    resource, metric = records[0].resource, records[0].metric
    header = ("layer", f"of all {resource}", *(f"at {share:.0%}" for share in SHARES), "by")
    rows = [
        (
            site,
            percentage(of_site[0].weight, 1),
            *(_text(_best(of_site, share)[0]) for share in SHARES),
            _best(of_site, RESISTANCE_SHARE)[1],
        )
        for site, of_site in by_resistance(records).items()
    ]
    table = align(header, rows, right=range(1, len(SHARES) + 2))
    explanation = f"least error ({metric}) at shares of a layer's {resource}; by: the method at {RESISTANCE_SHARE:.0%}"
    return f"{table}\n{explanation}"


def to_csv(records: Iterable[Sensitivity]) -> str:
    """A row for each point, under the names in ``COLUMNS``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for record in records:
        about = (record.site, record.method, record.resource, record.metric)
        writer.writerows([*about, *point] for point in record.points)
    return text.getvalue()


def _points(
    candidates: Iterable[Candidate], amount: Callable[[Cost], int], dense: int
) -> tuple[tuple[float, float], ...]:
    return tuple(sorted((amount(candidate.cost) / dense, candidate.error) for candidate in candidates))


def _dense_cost(site: Site) -> Cost:
    costs = (Cost(layer.params, layer.macs, layer.weight_bytes) for layer in site.layers)
    return sum(costs, start=Cost(0, 0, 0))


def _best(of_site: Iterable[Sensitivity], share: float) -> tuple[float, str]:
    """The least error at this share or less, and the method; infinite and a dash if nothing is as cheap."""
    error, method = min((record.error_at(share), record.method) for record in of_site)
    return error, "-" if math.isinf(error) else method


def _text(error: float) -> str:
    return "-" if math.isinf(error) else f"{error:.3g}"
