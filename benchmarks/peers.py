"""Other ways to the same budgets: for ``accuracy.py``, on the same images, and for ``latency.py``.

``Balf`` follows arXiv 2509.25136 as described there: the unfolded convolution is cut by an SVD whitened with the
uncentred second moment of its input, the energy kept is normalised by layer, and ranks come from a Lagrangian
relaxation of the FLOPs budget; biases are not corrected. A convolution becomes a k x k one and a 1 x 1 one.

The extra ``peers`` installs the others but for AIMET (``pip install aimet-torch``), which asks for torchvision.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from decimal import Decimal
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

import tdfx
from tdfx.decompositions import registry
from tdfx.decompositions.metric import metric_svd
from tdfx.metrics import form_of
from tdfx.passes.base import layer_at
from tdfx.passes.candidates import chain_cost, site_weight
from tdfx.passes.count import count
from tdfx.records.layer import Site

BISECTIONS = 60


class Balf:
    """Activation-aware SVD with Lagrangian rank allocation, for one network and calibration set."""

    def __init__(self, model: nn.Module, example: Tensor, calibration: Tensor, seed: int) -> None:
        self.captured = tdfx.capture(model, example, trainable=True)  # with BatchNorm apart, as trained
        moments = tdfx.calibrate(self.captured, calibration, metric="feature", seed=seed)
        profiled = tdfx.profile(
            self.captured, methods=["svd", "channel_svd"], moments=moments, correct=False, target=None, rank_multiple=1
        )
        self.before, self.rest = profiled.before, profiled.rest
        self.layers = [_Layer(self.captured, site, moments) for site in profiled.sites]

    def network(self, share: float) -> tuple[nn.Module, float]:
        """The network with the truncated weights put back in, and its share of the FLOPs."""
        limit = share * self.before.macs - self.rest.macs
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):  # the price of a multiply-accumulate at which the budget holds
            middle = (low + high) / 2
            if sum(layer.macs[layer.choice(middle)] for layer in self.layers) > limit:
                low = middle
            else:
                high = middle
        module = copy.deepcopy(self.captured.module)
        macs = self.rest.macs
        for layer in self.layers:
            rank = layer.choice(high)
            macs += layer.macs[rank]
            layer_at(module, layer.name).weight.data = layer.weight(rank).to(torch.float32)
        return module, macs / self.before.macs


class _Layer:
    """Costs and kept energies of all ranks; the last entry is the dense layer."""

    def __init__(self, captured: tdfx.Capture, site: Site, moments: tdfx.Moments) -> None:
        self.name, self.dense = site.name, site_weight(captured.module, site)
        self.left, self.right, norms = metric_svd(
            self.dense.flatten(1), form_of("feature:relative", moments.sites[site.name], corrected=False)
        )
        method = next(m for n, m in registry().items() if n in ("svd", "channel_svd") and not m.unsupported(site))
        energies = norms.square().cumsum(0) / norms.square().sum()
        costs = [chain_cost(method, site, (rank,), None).macs for rank in range(1, len(norms) + 1)]
        kept = [rank for rank, macs in enumerate(costs) if macs < site.layer.macs]
        self.ranks = [rank + 1 for rank in kept]
        self.macs = [*(costs[rank] for rank in kept), site.layer.macs]
        self.energies = torch.tensor([*(float(energies[rank]) for rank in kept), 1.0], dtype=torch.float64)

    def choice(self, price: float) -> int:
        """Index of the most energy less the price of its cost."""
        scale = 1e-6  # prices between 0 and 1 for costs in millions
        return int((self.energies - price * scale * torch.tensor(self.macs, dtype=torch.float64)).argmax())

    def weight(self, index: int) -> Tensor:
        if index == len(self.ranks):
            return self.dense
        rank = self.ranks[index]
        return (self.left[:, :rank] @ self.right[:rank]).reshape(self.dense.shape)


def uniform_rank(
    model: nn.Module, example: Tensor, share: float, factorization: str, *, decompose: bool = True
) -> tuple[nn.Module, float]:
    """tensorly-torch's factorized convolutions at one share of parameters, the largest that keeps the budget.

    Args:
        model: the network; its 3 x 3 convolutions but the first are factorized.
        example: an input, for counting.
        share: of the FLOPs.
        factorization: "cp" or "tucker".
        decompose: False for random factors, which take as long.
    """
    from tltorch import FactorizedConv

    def factorized(rank: float, *, decompose: bool) -> nn.Module:
        network = copy.deepcopy(model)
        for name, layer in list(network.named_modules()):
            if isinstance(layer, nn.Conv2d) and layer.in_channels > 3 and layer.groups == 1:
                parent, _, key = name.rpartition(".")
                made = FactorizedConv.from_conv(
                    layer,
                    rank=rank,
                    factorization=factorization,
                    decompose_weights=decompose,
                    implementation="factorized",
                )
                setattr(network.get_submodule(parent), key, made)
        return network.eval()

    total = _macs(model, example)
    low, high = 0.01, 1.0
    for _ in range(7):
        middle = (low + high) / 2
        fits = _macs(factorized(middle, decompose=False), example) <= share * total
        low, high = (middle, high) if fits else (low, middle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Tucker ranks above a mode's size are cut to it
        network = factorized(low, decompose=decompose)
    return network, _macs(network, example) / total


class GreedySpatialSvd:
    """AIMET's spatial SVD, ratios by its greedy selection; score: classes that agree with the network's own.

    Its scores of layers at ten ratios each are taken once, for all budgets.

    Args:
        model: the network; its first convolution is left as it is.
        example: an input, for counting.
        calibration: images that candidates are scored on.
    """

    def __init__(self, model: nn.Module, example: Tensor, calibration: Tensor) -> None:
        _define_torchvision_operators()
        self.model, self.example, self.calibration = model, example, calibration
        self.classes = self._classes(model)
        self.folder = tempfile.TemporaryDirectory()
        self.scores = Path(self.folder.name) / "data" / "greedy_selection_eval_scores_dict.pkl"  # where AIMET puts them

    def network(self, share: float) -> tuple[nn.Module, float]:
        """The network at a share of the multiply-accumulates, and the share it has."""
        from contextlib import chdir  # of Python 3.11

        from aimet_torch.common.defs import CompressionScheme, CostMetric, GreedySelectionParameters
        from aimet_torch.compress import ModelCompressor
        from aimet_torch.defs import SpatialSvdParameters

        first = next(layer for layer in self.model.modules() if isinstance(layer, nn.Conv2d))
        greedy = GreedySelectionParameters(
            target_comp_ratio=Decimal(str(share)),
            num_comp_ratio_candidates=10,
            saved_eval_scores_dict=str(self.scores) if self.scores.exists() else None,
        )
        mode = SpatialSvdParameters.AutoModeParams(greedy, modules_to_ignore=[first])
        with chdir(self.folder.name):
            network, _ = ModelCompressor.compress_model(
                self.model,
                self._agreement,
                None,
                (1, *self.example.shape[1:]),
                CompressionScheme.spatial_svd,
                CostMetric.mac,
                SpatialSvdParameters(SpatialSvdParameters.Mode.auto, mode),
            )
        return network.eval(), _macs(network, self.example) / _macs(self.model, self.example)

    def _agreement(self, network: nn.Module, iterations: int | None, use_cuda: bool = False) -> float:
        return float((self._classes(network.eval()) == self.classes).float().mean())

    def _classes(self, network: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([network(batch).argmax(1) for batch in self.calibration.split(256)])


def uniform_spatial_svd(model: nn.Module, example: Tensor, share: float) -> tuple[nn.Module, float]:
    """AIMET's spatial SVD with one ratio for all convolutions but the first.

    Args:
        model: the network.
        example: an input, for counting.
        share: of the multiply-accumulates of every such layer.
    """
    _define_torchvision_operators()
    from contextlib import chdir  # of Python 3.11

    from aimet_torch.common.defs import CompressionScheme, CostMetric
    from aimet_torch.compress import ModelCompressor
    from aimet_torch.defs import ModuleCompRatioPair, SpatialSvdParameters

    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    pairs = [ModuleCompRatioPair(layer, Decimal(str(share))) for layer in convolutions[1:] if layer.groups == 1]
    manual = SpatialSvdParameters.ManualModeParams(pairs)
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        network, _ = ModelCompressor.compress_model(
            model,
            lambda network, iterations, use_cuda=False: 0.0,
            None,
            tuple(example.shape),
            CompressionScheme.spatial_svd,
            CostMetric.mac,
            SpatialSvdParameters(SpatialSvdParameters.Mode.manual, manual),
        )
    return network.eval(), _macs(network, example) / _macs(model, example)


@cache
def _define_torchvision_operators() -> torch.library.Library:
    """What torchvision misses beside a build of torch that its own operators were not built for."""
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def pruned(model: nn.Module, example: Tensor, share: float) -> tuple[nn.Module, float]:
    """torch-pruning's magnitude pruning, the least that keeps the budget.

    Of residual networks only the channels inside blocks: some shortcuts pad by fixed numbers of channels.
    """
    import torch_pruning

    total = _macs(model, example)
    low, high = 0.0, 0.97
    found = model
    for _ in range(7):
        middle = (low + high) / 2
        network = copy.deepcopy(model)
        layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        inside = [name for name in layers if ".conv1" in name] or list(layers)[:-1]
        kept = [layer for name, layer in layers.items() if name not in inside]
        pruner = torch_pruning.pruner.MagnitudePruner(
            network, example, importance=torch_pruning.importance.MagnitudeImportance(), pruning_ratio=middle,
            ignored_layers=kept,
        )  # fmt: skip
        pruner.step()
        if _macs(network, example) <= share * total:
            high, found = middle, network
        else:
            low = middle
    return found.eval(), _macs(found, example) / total


def _macs(network: nn.Module, example: Tensor) -> int:
    return sum(workload.macs for workload in count(network, (example,), {}))
