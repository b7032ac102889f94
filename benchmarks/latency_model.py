"""Fits the latency constants of ``tdfx.targets.ORT_CPU`` on this machine and prints how well they predict.

    python benchmarks/latency_model.py [--seconds 60]

Every chain that the decompositions make of some seventy layers, and the layers themselves, run as small ONNX models on
one thread of ONNX Runtime, in shuffled rounds. The least processor time of all rounds counts, because neighbours only
ever add to it. Convolutions run between two thin 1 x 1 convolutions, whose own time is subtracted: reorders at a
chain's ends then show as they do inside a network. Two of three layers are fitted, every third is held out with all
its chains. Printed: the errors on both, those of the constants in ``tdfx/targets.py``, held-out examples, and the
constants to write there.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from scipy.optimize import least_squares

from tdfx.decompositions import find_methods
from tdfx.records.candidate import DENSE, format_rank
from tdfx.records.layer import LayerSpec, Rank, Shape, Site
from tdfx.targets import ORT_CPU, Target

Chain = tuple[LayerSpec, ...]
Floats = NDArray[np.float64]

METHODS = ("svd", "spatial_svd", "tucker2", "cp")
PICKS = {16: 4, 4: 2, 1: 3}  # ranks per method and layer: on the grid, on the alignment, anywhere
CONSTANTS = [field.name for field in fields(Target) if isinstance(getattr(ORT_CPU, field.name), float)]
MIN_ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """A layer, or a chain in its place, and its measured seconds."""

    layer: LayerSpec
    method: str
    rank: Rank
    chain: Chain
    seconds: float = math.nan


def conv(
    channels: tuple[int, int], size: Shape, kernel: int = 3, stride: int = 1, groups: int = 1, batch: int = 1
) -> LayerSpec:
    """A convolution of odd kernel that keeps the size but for its stride, called once."""
    dims = len(size)
    layer = LayerSpec(
        f"{channels[0]}>{channels[1]} k{kernel} s{stride} g{groups} @{'x'.join(map(str, size))} b{batch}",
        "conv1d" if dims == 1 else "conv2d",
        *channels,
        kernel_size=(kernel,) * dims,
        stride=(stride,) * dims,
        padding=(kernel // 2,) * dims,
        dilation=(1,) * dims,
        groups=groups,
        bias=True,
    )
    return layer.called_on(((batch, channels[0], *size),))


def linear(features: tuple[int, int], rows: int) -> LayerSpec:
    """A linear layer called once on (rows, features[0])."""
    layer = LayerSpec(f"{features[0]}>{features[1]} x{rows}", "linear", *features, bias=True)
    return layer.called_on(((rows, features[0]),))


def layers() -> list[LayerSpec]:
    """Layers as in ResNets, MobileNets, ResNeXts, audio networks and transformers."""
    square = [(16, 32), (32, 32), (32, 16), (32, 8), (64, 56), (64, 32), (64, 8), (48, 24), (96, 28), (128, 28)]
    square += [(128, 14), (256, 28), (256, 14), (256, 7), (512, 14), (512, 7), (320, 10)]
    batched = [(16, 32), (32, 16), (64, 16), (128, 8), (128, 16), (192, 14), (256, 8)]
    down = [(16, 32, 32), (64, 128, 56), (128, 256, 16), (256, 512, 14), (24, 48, 28)]
    points = [(64, 256, 56), (256, 64, 56), (128, 512, 28), (512, 128, 28), (1024, 256, 14), (512, 2048, 7)]
    points += [(96, 24, 28), (24, 144, 56), (256, 256, 16), (128, 128, 8), (64, 64, 32), (960, 160, 7)]
    stems = [(3, 64, 112, 7, 2), (3, 16, 32, 3, 1), (1, 32, 28, 5, 1), (3, 32, 112, 3, 2), (1, 8, 28, 3, 1)]
    depthwise = [(96, 56, 3, 1), (144, 28, 3, 2), (384, 14, 3, 1), (192, 28, 5, 1), (24, 28, 3, 1), (50, 28, 3, 1)]
    grouped = [(128, 28, 2), (128, 28, 32), (256, 14, 32), (256, 14, 8), (512, 14, 32), (64, 28, 4), (96, 28, 4)]
    audio = [(64, 64, 400, 3), (128, 128, 200, 5), (256, 256, 100, 3), (64, 128, 1000, 1)]
    matrices = [(512, 1000, 1), (512, 512, 2), (784, 300, 2), (64, 10, 8), (768, 768, 64), (768, 3072, 128)]
    matrices += [(3072, 768, 128), (384, 384, 197), (192, 576, 394), (256, 256, 256), (64, 256, 1024)]
    matrices += [(1024, 1024, 50), (96, 384, 3136)]
    return [
        *(conv((c, c), (s, s)) for c, s in square),
        *(conv((c, c), (s, s), batch=2) for c, s in batched),
        *(conv((i, o), (s, s), stride=2) for i, o, s in down),
        *(conv((i, o), (s, s), kernel=1) for i, o, s in points),
        *(conv((i, o), (s, s), kernel=k, stride=t) for i, o, s, k, t in stems),
        *(conv((c, c), (s, s), kernel=k, stride=t, groups=c) for c, s, k, t in depthwise),
        *(conv((c, c), (s, s), groups=g) for c, s, g in grouped),
        *(conv((i, o), (s,), kernel=k) for i, o, s, k in audio),
        *(linear((i, o), r) for i, o, r in matrices),
    ]


def cases() -> list[Case]:
    """Every layer, and what the methods make of those that they take."""
    found = []
    for layer in layers():
        site = Site.of(layer)
        found.append(Case(layer, DENSE, (), (layer,)))
        for method in find_methods(METHODS):
            if layer.groups == 1 and method.unsupported(site) is None:
                ranks = picked(method.ranks, site)
                found += [Case(layer, method.name, rank, method.chain(site, rank)) for rank in ranks]
    return found


def picked(ranks: Callable[[Site, int], Sequence[Rank]], site: Site) -> list[Rank]:
    """A few of the ranks offered, from the smallest to the largest, on each grid."""
    chosen: dict[Rank, None] = {}
    for grid, count in PICKS.items():
        offered = ranks(site, grid)
        chosen |= dict.fromkeys(offered[round(at)] for at in np.linspace(0, len(offered) - 1, count) if offered)
    return list(chosen)


def edges(first: Shape, last: Shape) -> tuple[Chain, Chain]:
    """Thin layers before an input and after an output of these shapes, which give them the layout of a network's."""
    if len(first) == 2:
        return (linear((4, first[1]), first[0]),), ()
    before = conv((4, first[1]), first[2:], kernel=1, batch=first[0])
    # It computes a single position: the reorder of its input, where one is due, is all that it costs.
    after = conv((last[1], 16), last[2:], kernel=1, stride=max(last[2:]), batch=last[0])
    return (before,), (after,)


def session(chain: Chain) -> Callable[[], None]:
    """What runs the chain once on one thread of ONNX Runtime, with input and output bound beforehand."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for i, layer in enumerate(chain):
        weights.append(numpy_helper.from_array(rng.standard_normal(layer.weight_shape, "f4"), f"w{i}"))
        weights.append(numpy_helper.from_array(np.zeros(layer.out_channels, "f4"), f"b{i}"))
        nodes.append(operator(layer, [f"x{i}", f"w{i}", f"b{i}"], f"x{i + 1}"))
    ends = {"x0": chain[0].calls[0].input_shape, f"x{len(chain)}": chain[-1].calls[0].output_shape}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ends.items()]
    graph = helper.make_graph(nodes, "chain", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    runner = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    arrays = [onnxruntime.OrtValue.ortvalue_from_numpy(rng.standard_normal(shape, "f4")) for shape in ends.values()]
    binding = runner.io_binding()
    binding.bind_ortvalue_input("x0", arrays[0])
    binding.bind_ortvalue_output(f"x{len(chain)}", arrays[1])
    return lambda: runner.run_with_iobinding(binding)


def operator(layer: LayerSpec, inputs: list[str], output: str) -> NodeProto:
    """The ONNX operator of a layer."""
    if layer.kind == "linear":
        return helper.make_node("Gemm", inputs, [output], transB=1)
    return helper.make_node(
        "Conv",
        inputs,
        [output],
        kernel_shape=layer.kernel_size,
        strides=layer.stride,
        pads=[*layer.padding, *layer.padding],
        group=layer.groups,
    )


def least_times(chains: Iterable[Chain], seconds: float) -> dict[Chain, float]:
    """Least seconds of one run of each chain, over shuffled rounds that last ``seconds`` in all."""
    runs = {chain: session(chain) for chain in chains}
    least = dict.fromkeys(runs, math.inf)
    order, rng = list(runs), np.random.default_rng(0)
    started, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or time.perf_counter() - started < seconds:
        for i in rng.permutation(len(order)):
            run = runs[order[i]]
            run()
            for _ in range(3):
                start = time.thread_time()  # the wall's would count the processes that share the core
                run()
                least[order[i]] = min(least[order[i]], time.thread_time() - start)
        rounds += 1
    print(f"{len(runs)} models, {rounds} rounds")
    return least


def measure(found: list[Case], seconds: float) -> list[Case]:
    """The cases with their seconds: those between the thin layers, less those of the thin layers alone."""
    whole, alone = {}, {}
    for case in found:
        first, last = case.chain[0].calls[0].input_shape, case.chain[-1].calls[0].output_shape
        before, after = edges(first, last)
        whole[case] = before + case.chain + after
        alone[case] = sum(edges(first, first), ())
    least = least_times(dict.fromkeys([*whole.values(), *alone.values()]), seconds)
    return [replace(case, seconds=least[whole[case]] - least[alone[case]]) for case in found]


class Table:
    """Measured against predicted seconds, each also as a ratio to the dense layer's."""

    def __init__(self, found: list[Case]) -> None:
        """Takes measured cases; every third layer is held out with all its chains."""
        dense = {case.layer: i for i, case in enumerate(found) if case.method == DENSE}
        held_out = list(dense)[2::3]
        self.cases = found
        self.dense = np.array([dense[case.layer] for case in found])
        self.chains = np.array([case.method != DENSE for case in found])
        self.held_out = np.array([case.layer in held_out for case in found])
        self.seconds = np.array([case.seconds for case in found])
        self.ratio = self.seconds / self.seconds[self.dense]

    def predicted(self, target: Target) -> Floats:
        """Seconds by the model."""
        return np.array([sum(map(target.layer_latency, case.chain)) for case in self.cases])

    def residuals(self, target: Target) -> Floats:
        """Log errors of the fitted layers' seconds, and of their ratios to dense, weighted where a decision is close.

        A chain falsely taken for faster does harm, one falsely taken for slower is a chance missed: the first counts
        double.
        """
        predicted = self.predicted(target)
        error = np.log(predicted / self.seconds)
        slip = error - error[self.dense]
        weight = np.exp(-0.5 * (np.log(self.ratio) / 0.5) ** 2) * np.where(slip < 0, 2.0, 1.0) * self.chains
        return np.concatenate([error[~self.held_out], (weight * slip)[~self.held_out]])

    def report(self, label: str, target: Target, rows: NDArray[np.bool_]) -> None:
        """Prints the errors on these rows."""
        predicted = self.predicted(target)
        error = np.abs(predicted / self.seconds - 1)[rows]
        chains = rows & self.chains
        faster, claimed = self.ratio[chains] < 1, (predicted / predicted[self.dense])[chains] < 1
        right = np.mean(faster == claimed)
        wrong, missed = self.ratio[chains][claimed & ~faster], np.sum(faster & ~claimed)
        print(
            f"{label}: {rows.sum()} models, error {np.median(error):.1%} median, {np.quantile(error, 0.9):.1%} at 90%\n"
            f"    {chains.sum()} chains, faster or slower than dense right for {right:.1%}; falsely faster {len(wrong)}"
            f" (worst takes {wrong.max(initial=1):.2f}x dense), falsely slower {missed}"
        )

    def examples(self, target: Target, every: int = 6) -> None:
        """Prints some of the held-out chains."""
        predicted = self.predicted(target)
        heads = ("method", "rank", "dense us", "chain us", "predicted", "speedup", "predicted")
        print("\n" + "held-out layer".ljust(32) + "".join(head.rjust(12) for head in heads))
        for i in np.flatnonzero(self.held_out & self.chains)[::every]:
            case, dense = self.cases[i], self.dense[i]
            micros = [1e6 * self.seconds[dense], 1e6 * self.seconds[i], 1e6 * predicted[i]]
            speedups = [1 / self.ratio[i], predicted[dense] / predicted[i]]
            cells = [f"{n:.1f}" for n in micros] + [f"{n:.2f}" for n in speedups]
            row = (case.method, format_rank(case.rank), *cells)
            print(case.layer.name.ljust(32) + "".join(cell.rjust(12) for cell in row))


def fit(table: Table) -> Target:
    """The target whose constants explain the fitted layers best."""

    def target(logs: Floats) -> Target:
        return replace(ORT_CPU, **dict(zip(CONSTANTS, np.exp(logs).tolist(), strict=True)))

    start = np.log([getattr(ORT_CPU, name) for name in CONSTANTS])
    found = least_squares(lambda logs: table.residuals(target(logs)), start, loss="soft_l1", f_scale=0.1, max_nfev=50)
    return target(found.x)


def main() -> None:
    """Measures, fits, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="time spent measuring (default 60)")
    table = Table(measure(cases(), parser.parse_args().seconds))
    fitted = fit(table)
    on_grid = np.array([all(r % ORT_CPU.rank_grid == 0 for r in case.rank) for case in table.cases])
    for name, target in (("fitted now", fitted), ("tdfx/targets.py", ORT_CPU)):
        table.report(f"{name}, fitted layers", target, ~table.held_out)
        table.report(f"{name}, held out", target, table.held_out)
        table.report("   of these on the grid", target, table.held_out & on_grid)
    table.examples(fitted)
    print("\n" + "\n".join(f"    {name}={getattr(fitted, name):.2g}," for name in CONSTANTS))


if __name__ == "__main__":
    main()
