"""Calibration moments: what the inputs and the loss of a network say of each of its sites."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tdfx.errors import InputError, PlanError
from tdfx.files import replacing
from tdfx.fingerprint import tensor_digest
from tdfx.records.layer import Skipped

VERSION = 2


@dataclass(frozen=True, eq=False)
class SiteMoments:
    """Second-order statistics of one site, float32; n = in k k for convolutions (the order of the weight), else in.

    Attributes:
        mean: (n,), of the layer's im2col input over samples and output positions, padding included.
        in_cov: (n, n), centred second moment of it, per position; or its diagonal blocks, (groups, n / groups,
            n / groups), of a layer in groups. Of an embedding of n rows the diagonal of the second moment of its
            one-hot input, (n,), not centred: how often each row is looked up, as a share.
        out_cov: (out, out), second moment of the loss's gradient at the layer's output, summed over a sample's
            positions; None without a loss.
        observations: how many independent inputs the covariances are of; None takes them as exact. Positions of all
            samples, with windows that overlap counted once for each input value.
    """

    mean: Tensor
    in_cov: Tensor
    out_cov: Tensor | None = None
    observations: int | None = None


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of all sites, made by ``calibrate``.

    Attributes:
        sites: by name of the layer.
        skipped: sites without moments, with reasons.
        samples: number of samples that were seen.
        output: what the loss took outputs for: "logits", "values" or "labels" (the caller's own loss); None without.
        inputs: some of the samples, one tensor a placeholder of the graph; for corrections that run the network.
        structure: fingerprint of the model's structure.
        weights: fingerprint of its weights.
        trainable: whether BatchNorm was kept in the graph they were taken on.
    """

    sites: Mapping[str, SiteMoments]
    skipped: tuple[Skipped, ...]
    samples: int
    output: str | None
    inputs: tuple[Tensor, ...]
    structure: str
    weights: str
    trainable: bool

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all tensors, which a plan keeps of the moments it was made with."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name} {tensor_digest(tensor)}\n".encode())
        return digest.hexdigest()[:32]

    def scarcity(self) -> str | None:
        """A sentence on sites whose inputs have more values than there are observations; None if there are none.

        Embeddings do not count: most rows of a large table are rare.
        """
        scarce = {
            name: (site.observations, site.in_cov.shape[-1])
            for name, site in self.sites.items()
            if site.observations is not None and site.observations < site.in_cov.shape[-1] and site.in_cov.dim() > 1
        }
        if not scarce:
            return None
        name, (observations, values) = min(scarce.items(), key=lambda item: item[1][0] / item[1][1])
        return (
            f"calibration saw little of {len(scarce)} layers, least of {name}: {observations} independent inputs of "
            f"{values} values; more samples would lose less"
        )

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all.

        Raises:
            InputError: the path cannot be written.
        """
        about = {
            "version": VERSION,
            "skipped": [[entry.layer, entry.reason] for entry in self.skipped],
            "samples": self.samples,
            "observations": {name: site.observations for name, site in self.sites.items()},
            "output": self.output,
            "structure": self.structure,
            "weights": self.weights,
            "trainable": self.trainable,
        }
        tensors = {name: tensor.contiguous().clone() for name, tensor in self._tensors().items()}
        with replacing(path) as staged:
            safetensors.torch.save_file(tensors, staged, {"tdfx_moments": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Reads what ``save`` wrote.

        Raises:
            InputError: the file cannot be read.
            PlanError: it holds no moments, or those of another version.
        """
        try:
            with safe_open(path, "pt") as archive:
                text = (archive.metadata() or {}).get("tdfx_moments")
                tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read moments from {path}: {error}") from error
        try:
            return cls._read(path, json.loads(text) if text else {}, tensors)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"{path} is no whole file of moments ({error!r}); make them anew with tdfx.calibrate"
            ) from error

    @classmethod
    def _read(cls, path: str | Path, about: dict[str, Any], tensors: dict[str, Tensor]) -> Moments:
        if about.pop("version", None) != VERSION:
            raise PlanError(f"{path} holds no moments of version {VERSION}; make them anew with tdfx.calibrate")
        skipped = tuple(Skipped(layer, reason) for layer, reason in about.pop("skipped"))
        observations = about.pop("observations")
        fields: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            field, _, site = name.partition(":")
            fields.setdefault(site if field != "input" else "", {})[field if field != "input" else site] = tensor
        inputs = fields.pop("", {})
        return cls(
            sites={site: SiteMoments(**values, observations=observations[site]) for site, values in fields.items()},
            skipped=skipped,
            inputs=tuple(inputs[str(index)] for index in range(len(inputs))),
            **about,
        )

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"input:{index}": value for index, value in enumerate(self.inputs)}
        for name, site in self.sites.items():
            tensors |= {f"mean:{name}": site.mean, f"in_cov:{name}": site.in_cov}
            if site.out_cov is not None:
                tensors[f"out_cov:{name}"] = site.out_cov
        return tensors
