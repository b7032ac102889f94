"""Correction of a compressed network on inputs: kept only as far as it brings the outputs nearer on inputs held out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tdfx.chains import Solved, replacements_of
from tdfx.contained import reason
from tdfx.divergence import OUTPUTS, divergence, resolve_output
from tdfx.inputs import run
from tdfx.passes.correct import FindCorrections, OutputSpread, ReestimateBatchNorm
from tdfx.passes.factorize import Factorize
from tdfx.passes.shape_prop import ShapeProp, bind
from tdfx.records.capture import Capture

POWERS = (1.0, 0.5)  # of the ratio of deviations
HELD_OUT = 4  # every so many-th sample
MEMORY = 2**28  # bytes of a network's largest value
LEAST = 8  # samples


@dataclass(frozen=True)
class Outcome:
    """What a correction did to the divergence from the original on inputs held out.

    Attributes:
        kind: "none", or what was kept.
        before: divergence without it.
        after: divergence of what was kept.
    """

    kind: str
    before: float
    after: float


class Unfit(Exception):
    """The inputs cannot tell whether a correction helps; says why."""


class Trial:
    """The original's inputs and outputs, to fit corrections on and to judge them by.

    Raises:
        Unfit: there are too few samples, or the original does not run on so many at once.
    """

    def __init__(self, captured: Capture, inputs: tuple[Tensor, ...], output: str | None) -> None:
        if not inputs or len(inputs[0]) < HELD_OUT:
            raise Unfit(f"it takes at least {HELD_OUT} samples to fit and judge it")
        if {value.shape[:1] for value in inputs} != {inputs[0].shape[:1]}:
            raise Unfit("the inputs do not all have one entry a sample, as offsets of bags do not")
        count = min(len(inputs[0]), _affordable(captured))
        held = torch.arange(count) % HELD_OUT == HELD_OUT - 1
        self.fit = tuple(value[:count][~held] for value in inputs)
        self.held = tuple(value[:count][held] for value in inputs)
        try:
            run(captured.module, self.fit, {})
            self.reference = run(captured.module, self.held, {})
        except Exception as error:
            raise Unfit(f"the network does not run on {len(self.fit[0])} samples at once: {reason(error)}") from error
        self.output = resolve_output(output if output in OUTPUTS else "auto", self.reference, self.held)

    def divergence(self, module: fx.GraphModule) -> float:
        """Of a network from the original, on the inputs held out; infinite where it is not a number."""
        found = float(divergence(self.reference, run(module, self.held, {}), self.output))
        return found if math.isfinite(found) else math.inf


def correct_spread(
    captured: Capture, solved: Mapping[str, Solved], inputs: tuple[Tensor, ...], output: str | None = None
) -> tuple[dict[str, Solved], Outcome]:
    """Factors and biases that give the layers' outputs their mean and spread back, if that helps.

    Args:
        captured: the original.
        solved: by name of the site; only those with a bias are corrected, and not where layers share their weight.
        inputs: samples, one tensor a placeholder.
        output: what the outputs are compared as, "logits" or "values"; by their shapes otherwise.

    Raises:
        Unfit: these inputs do not do for that.
    """
    trial = Trial(captured, inputs, output)
    names = {entry.last: name for name, entry in solved.items() if entry.bias is not None and entry.site.can_gain_bias}
    spread = OutputSpread(tuple(names.values()), trial.fit).run(captured.module)
    wanted = {last: spread[name] for last, name in names.items() if name in spread}
    plain = spliced(captured.module, solved)
    best, kind = dict(solved), "none"
    before = after = trial.divergence(plain)
    for power in POWERS:
        found = FindCorrections(wanted, trial.fit, power).run(plain)
        moved = {names[last]: solved[names[last]].moved(c.gain, c.shift) for last, c in found.items()}
        tried = {**solved, **moved}
        reached = trial.divergence(spliced(captured.module, tried))
        if reached < after:
            best, kind, after = tried, f"spread^{power:g}", reached
    return best, Outcome(kind, before, after)


def correct_batch_norms(
    captured: Capture, compressed: fx.GraphModule, inputs: tuple[Tensor, ...], output: str | None = None
) -> tuple[fx.GraphModule, Outcome]:
    """The network with BatchNorm's statistics taken anew, if that helps.

    Raises:
        Unfit: these inputs do not do for that.
    """
    trial = Trial(captured, inputs, output)
    before = trial.divergence(compressed)
    estimated = ReestimateBatchNorm(trial.fit).run(compressed)
    after = trial.divergence(estimated)
    if not after < before:
        return compressed, Outcome("none", before, before)
    return estimated, Outcome("BatchNorm", before, after)


def spliced(graph_module: fx.GraphModule, solved: Mapping[str, Solved]) -> fx.GraphModule:
    """The graph with chains in place of the solved layers."""
    return Factorize(replacements_of(solved)).run(graph_module)


def _affordable(captured: Capture) -> int:
    """Samples at which no value in the graph is larger than ``MEMORY``."""
    inputs = bind(captured.module, captured.args, captured.kwargs)
    metas = ShapeProp(inputs).run(captured.module).values()
    sample = max(math.prod(meta.shape) * meta.dtype.itemsize for meta in metas) / len(inputs[0])
    return max(LEAST, int(MEMORY / sample))
