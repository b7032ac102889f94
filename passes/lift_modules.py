"""Lifts what trains otherwise than it evaluates, and recurrent layers, back to the modules of the model.

torch.export of a model in eval mode writes BatchNorm with its running statistics and Dropout as doing nothing; as
modules they do in train mode what they did in the model.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tdfx.passes.base import RewritePass
from tdfx.passes.layer_operators import attribute
from tdfx.passes.lift_layers import module_path

aten = torch.ops.aten
BatchNorm = nn.modules.batchnorm._BatchNorm
BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
DROPOUTS: dict[Any, type[nn.Module]] = {
    aten.dropout.default: nn.Dropout,
    aten.feature_dropout.default: nn.Dropout2d,
    aten.alpha_dropout.default: nn.AlphaDropout,
    aten.feature_alpha_dropout.default: nn.FeatureAlphaDropout,
}
RNNS = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


@dataclass(frozen=True)
class LiftModules(RewritePass):
    """Operators of BatchNorm, Dropout and recurrent layers become calls of modules.

    Attributes:
        origin: the model, whose own modules are called where the operator is theirs.
    """

    origin: nn.Module

    def rewrite(self, graph_module: fx.GraphModule) -> None:
        for node in list(graph_module.graph.nodes):
            if node.target is aten.batch_norm.default:
                self._batch_norm(graph_module, node)
            elif node.target in DROPOUTS:
                self._dropout(graph_module, node)
            elif node.target in RNNS:
                self._rnn(graph_module, node)

    def _batch_norm(self, graph_module: fx.GraphModule, node: fx.Node) -> None:
        arguments: Any = node.args
        x, weight, bias, mean, var, training, momentum, eps, *_ = arguments
        if training or not isinstance(mean, fx.Node) or mean.op != "get_attr":
            return
        name = str(mean.target).rpartition(".")[0]
        module = _submodule(self.origin, name)
        if not isinstance(module, BatchNorm) or type(module).forward is not BatchNorm.forward:
            if "val" not in x.meta:
                return
            # A subclass may do more than normalise: the rest of its forward stands in the graph.
            values = [None if node is None else attribute(graph_module, node) for node in (weight, bias, mean, var)]
            counter = getattr(module, "num_batches_tracked", None)
            momentum = getattr(module, "momentum", momentum)
            module = _plain_batch_norm(x.meta["val"].dim(), values, counter, momentum, eps)
        _call(graph_module, node, name, module, (x,))

    def _dropout(self, graph_module: fx.GraphModule, node: fx.Node) -> None:
        x, p, _ = node.args
        path = module_path(node)
        module = _submodule(self.origin, path)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            _call(graph_module, node, path, module, (x,))
            return
        called = {n.target for n in graph_module.graph.nodes if n.op == "call_module"}
        prefix = f"{path}." if path else ""
        name = next(name for number in range(len(called) + 1) if (name := f"{prefix}dropout_{number}") not in called)
        _call(graph_module, node, name, DROPOUTS[node.target](p), (x,))

    def _rnn(self, graph_module: fx.GraphModule, node: fx.Node) -> None:
        arguments: Any = node.args
        x, state, parameters, *_ = arguments
        path = str(parameters[0].target).rpartition(".")[0]
        module = _submodule(self.origin, path)
        if not isinstance(module, nn.RNNBase):
            return
        state = tuple(state) if isinstance(state, list | tuple) else state
        value = _call(graph_module, node, path, module, (x, state))
        if not isinstance(module, nn.LSTM):
            return
        # The operator returns (output, h, c), the module (output, (h, c)).
        for user in list(value.users):
            index: Any = user.args[1]
            if user.target is operator.getitem and index:
                with graph_module.graph.inserting_before(user):
                    hidden = graph_module.graph.call_function(operator.getitem, (value, 1))
                    part = graph_module.graph.call_function(operator.getitem, (hidden, index - 1))
                user.replace_all_uses_with(part)
                graph_module.graph.erase_node(user)


def _plain_batch_norm(
    dims: int, values: list[Tensor | None], counter: Tensor | None, momentum: Any, eps: float
) -> nn.Module:
    weight, bias, mean, var = values
    assert mean is not None
    module = BATCH_NORMS[dims](len(mean), eps, momentum, affine=weight is not None, device="meta").eval()
    module.weight, module.bias = weight, bias  # type: ignore[assignment]
    module.running_mean, module.running_var = mean, var
    module.num_batches_tracked = torch.tensor(0) if counter is None else counter
    return module


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _call(
    graph_module: fx.GraphModule, node: fx.Node, name: str, module: nn.Module, arguments: tuple[Any, ...]
) -> fx.Node:
    """Puts a module at a name and calls it in place of the node."""
    graph_module.add_submodule(name, module)
    with graph_module.graph.inserting_before(node):
        value = graph_module.graph.call_module(name, arguments)
    value.meta.update(node.meta)
    node.replace_all_uses_with(value)
    graph_module.graph.erase_node(node)
    return value
