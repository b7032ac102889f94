"""What has to be timed for a profile: models of layers and chains, and which of them make up each candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tdfx.decompositions import registry
from tdfx.errors import OptionError
from tdfx.latency.micro_model import TYPES, Piece
from tdfx.records.candidate import DENSE
from tdfx.records.layer import Fused, LayerSpec, Site
from tdfx.records.profile import Profile


@dataclass(frozen=True)
class Kit:
    """What ``runner.measure`` takes.

    Attributes:
        groups: keys of a layer's model and of the chains' that may take its place.
        rows: site, method, rank, and by call the keys of the layer and of what takes its place.
        structure: fingerprint of the network's structure.
        pieces: by key.
    """

    groups: list[list[str]]
    rows: list[list[Any]]
    structure: str
    pieces: dict[str, Piece]

    @property
    def listing(self) -> dict[str, Any]:
        """All but the models, for JSON."""
        sizes = {key: piece.weight_bytes for key, piece in self.pieces.items()}
        return {"groups": self.groups, "bytes": sizes, "rows": self.rows, "structure": self.structure}


def kit_of(profile: Profile, fused: Mapping[str, tuple[Fused, ...]]) -> Kit:
    """What to time for the candidates of a profile.

    Args:
        profile: sites and candidates.
        fused: what follows each call of a site, by site.

    Raises:
        OptionError: a site is not float32.
    """
    pieces: dict[str, Piece] = {}
    groups: dict[str, dict[str, None]] = {}
    rows: list[list[Any]] = []

    def key_of(layers: tuple[LayerSpec, ...], site: Site, call: int) -> str:
        piece = Piece(layers, call, fused[site.name][call])
        return next(iter({piece.key: pieces.setdefault(piece.key, piece)}))

    for site in profile.sites:
        if site.layer.dtype not in TYPES:
            raise OptionError(
                f"layer {site.name} is {site.layer.dtype}; latency is measured in float32 only: convert the model with "
                ".float(), or exclude the layer"
            )
        calls = range(len(site.layer.calls))
        dense = [key_of(site.layers, site, call) for call in calls]
        for key in dense:
            groups.setdefault(key, {key: None})
        rows.append([site.name, DENSE, [], [(key, key) for key in dense]])
        for candidate in profile.of_site(site.name):
            if candidate.is_dense:
                continue
            layers = registry()[candidate.method].chain(site, candidate.rank)
            pairs = [(dense[call], key_of(layers, site, call)) for call in calls]
            for key, chain in pairs:
                groups[key][chain] = None
            rows.append([site.name, candidate.method, list(candidate.rank), pairs])
    return Kit([list(keys) for keys in groups.values()], rows, profile.structure, pieces)
