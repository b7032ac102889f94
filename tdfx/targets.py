"""Latency on a deployment target, estimated from shapes: what the planner knows before anything is timed.

What decides on ONNX Runtime's CPU provider is the layout. Float32 2-D convolutions run in a layout blocked by
16 channels (NCHWc, AVX-512) wherever the runtime can put them there:

- ungrouped: input channels a multiple of 4, or below 16 (then a slower kernel reads the plain layout);
- depthwise: channels a multiple of 4;
- grouped: input and output channels per group both multiples of 16.

A blocked operator computes whole blocks: 49 output channels cost what 64 cost. Every other convolution (1-D, 3-D,
transposed, and float16 or float64 ones among them) is unfolded and multiplied as a matrix, and where plain and blocked
operators meet, the tensor is reordered: so ranks of convolutions that are no multiple of 4, or below 16, cost up to
twice the time of the next one on the grid. Matrix products do not care.

The rule is what ONNX Runtime 1.31 does to the graphs that it optimizes (NCHWc transformer). The constants are fitted by
``benchmarks/latency_model.py``, which prints how well they predict layers that they were not fitted on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tdfx.errors import OptionError
from tdfx.records.cost import Cost, Workload
from tdfx.records.layer import LayerSpec, Site
from tdfx.records.reading import parse, read


@dataclass(frozen=True)
class Target:
    """A runtime on a kind of processor, one thread.

    Attributes:
        name: what the user calls it.
        rank_grid: channels per block of the runtime's convolution layout; ranks on this grid waste nothing.
        alignment: a blocked operator's input channels are a multiple of this.
        sweep_channels: output channels computed in one sweep over a blocked input.
        operator_s: seconds per operator, whatever its size.
        blocked_mac_s: seconds per multiply-accumulate of a blocked convolution, padding included.
        sweep_s: seconds per input element and kernel position, for each sweep over a blocked input.
        accumulate_s: seconds per output element and input channel where a blocked convolution reads the plain layout.
        depthwise_mac_s: seconds per multiply-accumulate of a blocked depthwise convolution.
        matrix_mac_s: seconds per multiply-accumulate of a matrix product, or a convolution run as one.
        plain_depthwise_mac_s: seconds per multiply-accumulate of a depthwise convolution outside the blocked layout.
        group_s: seconds per group of a grouped convolution outside the blocked layout.
        copy_byte_s: seconds per byte reordered between layouts or unfolded for a matrix product.
        byte_s: seconds per byte written by depthwise convolutions and matrix products.
        weight_byte_s: seconds per byte of weight.
    """

    name: str
    rank_grid: int
    alignment: int
    sweep_channels: int
    operator_s: float
    blocked_mac_s: float
    sweep_s: float
    accumulate_s: float
    depthwise_mac_s: float
    matrix_mac_s: float
    plain_depthwise_mac_s: float
    group_s: float
    copy_byte_s: float
    byte_s: float
    weight_byte_s: float

    def latency(self, workload: Workload) -> float:
        """Estimated seconds of one operator, its share of the reorders around it included."""
        blocked = self.is_blocked(workload)
        compute = self._blocked_latency(workload) if blocked else self._plain_latency(workload)
        return (
            self.operator_s
            + compute
            + self.copy_byte_s * self._reordered_bytes(workload, blocked)
            + self.weight_byte_s * workload.itemsize * workload.weight_elements
        )

    def layer_latency(self, layer: LayerSpec) -> float:
        """Estimated seconds of all calls of a layer."""
        return sum(self.latency(workload) for workload in layer.workloads)

    def is_blocked(self, workload: Workload) -> bool:
        """Whether the runtime computes this operator in its blocked layout."""
        if not workload.conv or workload.scattered or workload.itemsize != 4:
            return False
        if _is_depthwise(workload):
            return workload.out_channels % self.alignment == 0
        if workload.groups > 1:
            sizes = (workload.in_channels // workload.groups, workload.out_channels // workload.groups)
            return all(size % self.rank_grid == 0 for size in sizes)
        return workload.in_channels < self.rank_grid or workload.in_channels % self.alignment == 0

    def _blocked_latency(self, workload: Workload) -> float:
        taps = workload.positions * workload.kernel
        if _is_depthwise(workload):
            macs = taps * _round_up(workload.out_channels, self.rank_grid)
            return self.depthwise_mac_s * macs + self.byte_s * _output_bytes(workload)
        outputs = _round_up(workload.out_channels // workload.groups, self.rank_grid)
        direct = workload.in_channels < self.rank_grid
        inputs = workload.in_channels if direct else _round_up(workload.in_channels, self.rank_grid)
        seconds = taps * inputs * (self.blocked_mac_s * outputs + self.sweep_s * -(-outputs // self.sweep_channels))
        # The kernel for the plain layout adds channel by channel to outputs in memory.
        return seconds + (self.accumulate_s * workload.positions * inputs * outputs if direct else 0.0)

    def _plain_latency(self, workload: Workload) -> float:
        groups = self.group_s * workload.groups if workload.groups > 1 else 0.0
        if _is_depthwise(workload):
            return groups + self.plain_depthwise_mac_s * workload.macs
        # Of a transposed convolution it is the products that are folded, into the output.
        channels = workload.out_channels if workload.scattered else workload.in_channels
        unfolded = workload.positions * channels * workload.kernel if workload.kernel > 1 else 0
        return (
            groups
            + self.matrix_mac_s * workload.macs
            + self.copy_byte_s * workload.itemsize * unfolded
            + self.byte_s * _output_bytes(workload)
        )

    def _reordered_bytes(self, workload: Workload, blocked: bool) -> int:
        """Bytes reordered because a neighbour wants the other layout; the producer of a tensor pays for it."""
        if not workload.conv:
            return 0
        outputs = workload.outputs if blocked != self._suits(workload.out_channels) else 0
        # A grouped convolution can be plain although its producer, seeing the channels, takes it for blocked.
        inputs = workload.inputs if not blocked and self._suits(workload.in_channels) else 0
        return workload.itemsize * (outputs + inputs)

    def _suits(self, channels: int) -> bool:
        """Whether an ungrouped convolution that reads this many channels wants them blocked."""
        return channels >= self.rank_grid and channels % self.alignment == 0


def _is_depthwise(workload: Workload) -> bool:
    """Whether there is a depthwise kernel for it; a transposed one runs group by group, as all in groups do."""
    alike = workload.in_channels == workload.out_channels == workload.groups
    return workload.groups > 1 and alike and not workload.scattered


def _output_bytes(workload: Workload) -> int:
    return workload.itemsize * workload.outputs


def _round_up(channels: int, grid: int) -> int:
    return -(-channels // grid) * grid


# Seconds fitted by `python benchmarks/latency_model.py` (ONNX Runtime 1.31, one thread of a 2.5 GHz AVX-512 Xeon).
# Of layers in groups only dense ones were among the layers fitted, none of the chains in their place. Depthwise ones
# with several outputs a channel, which the runtime takes for grouped ones, come out up to 4 times too dear; they are
# slower than what they would replace all the same. No transposed ones were fitted: they take 1.2 times the estimate,
# and chains in their place up to 1.3 times that where what stands around them is transposed too, and not blocked.
ORT_CPU = Target(
    name="ort-cpu",
    rank_grid=16,
    alignment=4,
    sweep_channels=64,
    operator_s=2.4e-6,
    blocked_mac_s=1.3e-11,
    sweep_s=1.4e-10,
    accumulate_s=8e-11,
    depthwise_mac_s=6.8e-12,
    matrix_mac_s=1.5e-11,
    plain_depthwise_mac_s=5e-10,
    group_s=3.2e-7,
    copy_byte_s=1.7e-10,
    byte_s=1.1e-10,
    weight_byte_s=2.7e-11,
)

FILE = ".json"
TARGETS = {target.name: target for target in (ORT_CPU,)}


def find_target(name: str | None) -> Target | None:
    """The target of this name, or in the file of this name; None stands for no target, hence no latency.

    Raises:
        OptionError: no target has this name, or the file cannot be read.
    """
    if name is None:
        return None
    if isinstance(name, str) and name.endswith(FILE):
        return read_target(Path(name))
    if not isinstance(name, str) or name not in TARGETS:
        raise OptionError(
            f"target is {name!r}, expected one of {', '.join(map(repr, sorted(TARGETS)))}, "
            "a file of tdfx latency-fit, or None"
        )
    return TARGETS[name]


def read_target(path: Path) -> Target:
    """The target that ``tdfx latency-fit`` wrote; its name is the path, by which plans find it again.

    Raises:
        OptionError: the file cannot be read, or holds something else.
    """
    try:
        target = read(Target, parse(path.read_text(encoding="utf-8"), str(path), OptionError), str(path), OptionError)
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"target {path} cannot be read: {error}") from error
    return replace(target, name=str(path))


def site_cost(site: Site, target: Target | None) -> Cost:
    """Cost of all layers of a site."""
    first, *others = (layer_cost(layer, target) for layer in site.layers)
    return sum(others, start=first)


def layer_cost(layer: LayerSpec, target: Target | None) -> Cost:
    """Cost of a layer over all its calls; its parameters count once, ``latency_s`` is None without a target."""
    latency_s = None if target is None else target.layer_latency(layer)
    return Cost(layer.params, layer.macs, layer.weight_bytes, latency_s)
