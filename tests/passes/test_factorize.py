"""Splicing: names a person can read, both calls of a shared layer, and everything else as it was."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from networks import build
from torch import Tensor, fx, nn

from tdfx.decompositions import registry
from tdfx.errors import PassError
from tdfx.passes.base import describe
from tdfx.passes.factorize import Factorize, Replacement
from tdfx.passes.shape_prop import ShapeProp
from tdfx.passes.sites import FindSites
from tdfx.stages.capture import capture


def captured(name: str) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    model, args = build(name)
    return capture(model, args).module, args


def replacements(module: fx.GraphModule, args: tuple[Tensor, ...], methods: dict[str, str]) -> dict[str, Replacement]:
    """Full-rank chains of these methods for these layers."""
    sites = {site.name: site for site in FindSites(ShapeProp(args).run(module)).run(module)[0]}
    found = {}
    for name, chosen in methods.items():
        layer: Any = module.get_submodule(name)
        method, site = registry()[chosen], sites[name]
        rank = method.full_rank(site)
        factors = method.decompose(layer.weight.detach().double(), rank)
        found[name] = Replacement(chosen, method.build(site, rank, factors, layer.bias))
    return found


METHODS = {
    "stem.0": "spatial_svd",
    "layer1.conv1": "cp",
    "layer2.shortcut.0": "svd",
    "layer3.conv2": "tucker2",
    "fc": "svd",
}
FACTORS = {
    "stem.0": ["spatial_svd.vertical", "spatial_svd.horizontal"],
    "layer1.conv1": ["cp.reduce", "cp.depthwise", "cp.expand"],
    "layer2.shortcut.0": ["svd.reduce", "svd.expand"],
    "layer3.conv2": ["tucker2.reduce", "tucker2.core", "tucker2.expand"],
    "fc": ["svd.reduce", "svd.expand"],
}


def calls(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_module"]


def test_factors_are_called_by_name_and_the_rest_keeps_its_names() -> None:
    module, args = captured("resnet")
    chains = replacements(module, args, METHODS)
    before, expected = describe(module), module(*args)
    compressed = Factorize(chains).run(module)
    assert calls(compressed) == [
        factor
        for target in calls(module)
        for factor in ([f"{target}.{name}" for name in FACTORS[target]] if target in FACTORS else [target])
    ]
    assert compressed.state_dict().keys() - module.state_dict().keys() == {
        f"{layer}.{factor}.{name}"
        for layer, factors in FACTORS.items()
        for factor in factors
        for name in ("weight", "bias")
        if name == "weight" or factor in (factors[-1],)
    }
    assert module.state_dict().keys() - compressed.state_dict().keys() == {
        f"{layer}.{name}" for layer in FACTORS for name in ("weight", "bias")
    }
    compressed.graph.lint()
    torch.testing.assert_close(compressed(*args), expected, rtol=1e-3, atol=1e-3)
    assert describe(module) == before
    torch.testing.assert_close(module(*args), expected, rtol=0, atol=0)


def test_layers_that_stay_are_shared_and_those_replaced_are_gone() -> None:
    module, args = captured("resnet")
    compressed = Factorize(replacements(module, args, METHODS)).run(module)
    for target in calls(module):
        if target in METHODS:
            assert type(compressed.get_submodule(target)) is nn.Sequential
        else:
            assert compressed.get_submodule(target) is module.get_submodule(target)


@pytest.mark.parametrize("training", [False, True])
def test_factors_take_the_mode_of_the_graph(training: bool) -> None:
    module, args = captured("resnet")
    chains = replacements(module, args, METHODS)
    for entry in chains.values():
        entry.chain.train(not training)
    compressed = Factorize(chains).run(module.train(training))
    assert {part.training for part in compressed.modules()} == {training}


def test_a_layer_that_is_called_twice_is_replaced_at_both_calls() -> None:
    module, args = captured("siamese")
    methods = {"trunk.2": "tucker2", "embed": "svd"}
    compressed = Factorize(replacements(module, args, methods)).run(module)
    for layer, method in methods.items():
        assert layer not in calls(compressed)
        assert calls(compressed).count(f"{layer}.{method}.reduce") == 2
    torch.testing.assert_close(compressed(*args), module(*args), rtol=1e-4, atol=1e-4)


def test_the_last_factor_takes_the_meta_of_the_layer() -> None:
    module, args = captured("resnet")
    (node,) = (node for node in module.graph.nodes if node.target == "layer1.conv1")
    kept = node.meta["batch_norm"]
    compressed = Factorize(replacements(module, args, METHODS)).run(module)
    metas = {node.target: node.meta for node in compressed.graph.nodes}
    assert metas["layer1.conv1.cp.expand"]["batch_norm"] is kept
    assert "batch_norm" not in metas["layer1.conv1.cp.reduce"]
    assert "batch_norm" not in metas["stem.2"]


def test_a_layer_called_by_keyword_is_replaced() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(input=x)
            return y

    x = torch.randn(2, 3)
    module = capture(Named(), x).module
    compressed = Factorize(replacements(module, (x,), {"fc": "svd"})).run(module)
    torch.testing.assert_close(compressed(x), module(x), rtol=1e-5, atol=1e-5)


def test_a_layer_that_the_graph_does_not_call_is_an_error() -> None:
    module, args = captured("siamese")
    (entry,) = replacements(module, args, {"embed": "svd"}).values()
    for name in ("trunk", "trunk.2.weight", "nowhere"):
        with pytest.raises(PassError, match=rf"Factorize: no node calls {name}; the graph calls 4 modules"):
            Factorize({"embed": entry, name: entry}).run(module)


def test_the_result_is_copied_pickled_and_trained() -> None:
    module, args = captured("resnet")
    compressed = Factorize(replacements(module, args, METHODS)).run(module)
    expected = compressed(*args)
    for other in (copy.deepcopy(compressed), pickle.loads(pickle.dumps(compressed))):
        torch.testing.assert_close(other(*args), expected, rtol=0, atol=0)
        assert list(other.state_dict()) == list(compressed.state_dict())
    compressed.train()(*args).sum().backward()
    assert all(parameter.grad is not None for parameter in compressed.parameters())
