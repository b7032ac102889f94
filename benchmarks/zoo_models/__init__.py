"""Architectures by name: ``build(name)`` gives a network whose weights are random, and inputs for it.

One file a family; its ``MODELS`` has one entry an architecture. A family is imported when it is asked for, since those
but ``handwritten`` need the extra ``zoo``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import torch

from zoo_models.case import Case, Factory, enliven

FAMILIES = ("handwritten", "torchvision", "timm", "transformers")

__all__ = ["FAMILIES", "Case", "Factory", "build", "family"]


def family(name: str) -> Mapping[str, Factory]:
    """Factories of a family by the names of its architectures.

    Raises:
        ImportError: the library is not there.
    """
    models: Mapping[str, Factory] = import_module(f"zoo_models.{name}").MODELS
    return models


def build(factory: Factory, seed: int = 0) -> Case:
    """A network in eval mode, ready to be compared, and its example inputs; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        case = factory()
        enliven(case)
    return case
