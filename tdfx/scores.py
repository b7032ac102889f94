"""Measured scores of compressed networks: what a caller's function says of them, asked once for each."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import ModuleType

from torch import nn

from tdfx.cache import ListCache, sources_digest
from tdfx.errors import PlanError
from tdfx.evaluation import Evaluate, check_evaluate, score
from tdfx.moments import Moments
from tdfx.records.capture import Capture
from tdfx.records.plan import Plan
from tdfx.records.profile import Profile
from tdfx.stages.apply import carry_out
from tdfx.version import VERSION


class Scores:
    """Scores of the original and of plans, kept in memory and, for functions that have a name, on disk.

    What a function measures cannot be seen from outside: its data may change while its name and source stay. On disk a
    score is kept under the file, qualified name and source text of the function, and under all that decides the
    network: weights, methods, ranks, seed, metric, moments. A caller who measures on other data chooses another folder.
    Scores by lambdas, nested functions, methods and other callables stay in memory.

    The function gets a copy of each network, in eval mode, and may do with it what it likes.

    Attributes:
        measured: number of times that the function was called.

    Raises:
        OptionError: ``evaluate`` cannot be called, or ``cache_dir`` is no path.
        InputError: the folder cannot be made.
    """

    def __init__(
        self,
        captured: Capture,
        evaluate: Evaluate,
        *,
        moments: Moments | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        check_evaluate(evaluate)
        self.measured = 0
        self._captured = captured
        self._evaluate = evaluate
        self._moments = moments
        self._identity = _identity(evaluate)
        self._cache = ListCache(cache_dir if self._identity is not None else None)
        self._known: dict[tuple[object, ...], float] = {}

    def original(self) -> float:
        """Score of the model as given.

        Raises:
            OptionError: the function returns no finite number.
        """
        return self._score(("original",), lambda: self._captured.original)

    def of(self, plan: Plan) -> float:
        """Score of the network that a plan makes.

        Raises:
            OptionError: the function returns no finite number.
            PlanError, VerificationError: see ``apply``.
        """
        choices = tuple((choice.site, choice.method, choice.rank) for choice in plan.candidates if not choice.is_dense)
        made_of = (choices, plan.seed, plan.metric, plan.corrected, plan.trainable, plan.moments)
        return self._score(made_of, lambda: carry_out(self._captured, plan, moments=self._moments).module)

    def _score(self, made_of: tuple[object, ...], make: Callable[[], nn.Module]) -> float:
        if made_of not in self._known:
            code = (VERSION, sources_digest("tdfx"), sources_digest("tdfx.decompositions"))
            key = ("score", code, self._identity, self._captured.structure, self._captured.weights, made_of)
            (self._known[made_of],) = self._cache.get(key, 1, partial(self._measure, make))
        return self._known[made_of]

    def _measure(self, make: Callable[[], nn.Module]) -> list[float]:
        network = copy.deepcopy(make()).eval()  # factors share memory with the layers that stay
        self.measured += 1
        return [score(self._evaluate, network)]


def check_belongs(captured: Capture, profile: Profile, moments: Moments | None) -> None:
    """Raises PlanError unless the profile is of this capture and was made with these moments."""
    made_for = (profile.structure, profile.weights, profile.trainable)
    if made_for != (captured.structure, captured.weights, captured.trainable):
        raise PlanError("the profile was made for another capture: structure, weights or trainable differ; profile it")
    found = None if moments is None else moments.fingerprint
    if found != profile.moments:
        raise PlanError(
            f"the profile was made with {_named(profile.moments)}, given are {_named(found)}; give the same to both"
        )


def _named(fingerprint: str | None) -> str:
    return "no moments" if fingerprint is None else f"moments of fingerprint {fingerprint[:8]}"


def _identity(evaluate: Evaluate) -> tuple[str, ...] | None:
    """File, name and source of a function that can be found again by its name; None for others."""
    module, name = sys.modules.get(evaluate.__module__), getattr(evaluate, "__qualname__", "")
    try:
        found = attrgetter(name)(module)
        source = inspect.getsource(evaluate)
    except (AttributeError, OSError, TypeError):
        return None
    file = _file(module)
    return (file, name, source) if found is evaluate and file else None


def _file(module: ModuleType | None) -> str:
    path = getattr(module, "__file__", None)
    return str(Path(path).resolve()) if path else ""
