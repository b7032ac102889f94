"""What has to be timed for a profile: models of layers and chains, and which of them make up each candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tdfx.decompositions import method_for
from tdfx.errors import OptionError
from tdfx.latency.grid import sweep
from tdfx.latency.micro_model import TYPES, Piece
from tdfx.records.candidate import DENSE, Candidate
from tdfx.records.layer import Fused, LayerSpec, Site
from tdfx.records.profile import Profile


@dataclass(frozen=True)
class Kit:
    """What ``runner.measure`` takes.

    Attributes:
        groups: keys of a layer's model and of the chains' that may take its place.
        rows: site, method, rank, and by call the keys of the layer and of what takes its place.
        structure: fingerprint of the network's structure.
        grid: key, width and multiply-accumulates of each model that the grid of ranks is found by; may be empty.
        pieces: by key.
    """

    groups: list[list[str]]
    rows: list[list[Any]]
    structure: str
    grid: list[tuple[str, int, int]]
    pieces: dict[str, Piece]

    @property
    def listing(self) -> dict[str, Any]:
        """All but the models, for JSON."""
        sizes = {key: piece.weight_bytes for key, piece in self.pieces.items()}
        return {
            "groups": self.groups,
            "bytes": sizes,
            "rows": self.rows,
            "structure": self.structure,
            "grid": self.grid,
        }


def kit_of(profile: Profile, fused: Mapping[str, tuple[Fused, ...]], *, with_grid: bool = False) -> Kit:
    """What to time for the candidates of a profile.

    Args:
        profile: sites and candidates.
        fused: what follows each call of a layer, by name of the layer.
        with_grid: whether the grid of ranks is looked for too.

    Raises:
        OptionError: a site is not float32.
    """
    pieces: dict[str, Piece] = {}
    groups: dict[str, dict[str, None]] = {}
    rows: list[list[Any]] = []

    def added(piece: Piece) -> str:
        key = piece.key
        pieces.setdefault(key, piece)
        return key

    for site in profile.sites:
        if site.layer.dtype not in TYPES:
            raise OptionError(
                f"layer {site.name} is {site.layer.dtype}; latency is measured in float32 only: convert the model with "
                ".float(), or exclude the layer"
            )
        calls = [
            (index, call, follows)
            for index, layer in enumerate(site.layers)
            for call, follows in enumerate(fused[layer.name])
        ]
        dense = [added(Piece((site.layers[index],), call, follows)) for index, call, follows in calls]
        for key in dense:
            groups.setdefault(key, {key: None})
        rows.append([site.name, DENSE, [], [(key, key) for key in dense]])
        for candidate in profile.of_site(site.name):
            if candidate.is_dense:
                continue
            chains = _chains(site, candidate)
            pairs = [
                (key, added(Piece(chains[index], call, follows)))
                for key, (index, call, follows) in zip(dense, calls, strict=True)
            ]
            for key, chain in pairs:
                groups[key][chain] = None
            rows.append([site.name, candidate.method, list(candidate.rank), pairs])
    grid = [(added(piece), width, piece.macs) for width, piece in (sweep() if with_grid else {}).items()]
    return Kit([list(keys) for keys in groups.values()], rows, profile.structure, grid, pieces)


def _chains(site: Site, candidate: Candidate) -> tuple[tuple[LayerSpec, ...], ...]:
    """A candidate's layers; where biases are corrected the last has one, though the site may not."""
    chains = method_for(site, candidate.method).chains(site, candidate.rank)
    if candidate.cost.params == sum(layer.params for chain in chains for layer in chain):
        return chains
    ((*others, last),) = chains
    return ((*others, replace(last, bias=True)),)
