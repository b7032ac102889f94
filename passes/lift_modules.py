"""Lifts what trains otherwise than it evaluates, recurrent layers and bags of embeddings back to the model's modules.

torch.export of a model in eval mode writes BatchNorm with its running statistics, Dropout as doing nothing and RReLU
as of one slope; as modules they do in train mode what they did in the model.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tdfx.passes.base import RewritePass
from tdfx.passes.capture import has_torch_forward
from tdfx.passes.layer_operators import attribute, parameter_read
from tdfx.passes.lift_layers import make_way, module_path
from tdfx.passes.recurrent import is_recurrent
from tdfx.passes.recurrent_operators import RecurrentCall, recurrent_call

aten = torch.ops.aten
BatchNorm = nn.modules.batchnorm._BatchNorm
InstanceNorm = nn.modules.instancenorm._InstanceNorm
BAG_MODES = {"sum": 0, "mean": 1, "max": 2}
BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
DROPOUTS: dict[Any, type[nn.Module]] = {
    aten.dropout.default: nn.Dropout,
    aten.feature_dropout.default: nn.Dropout2d,
    aten.alpha_dropout.default: nn.AlphaDropout,
    aten.feature_alpha_dropout.default: nn.FeatureAlphaDropout,
    aten.dropout_.default: nn.Dropout,
    aten.feature_dropout_.default: nn.Dropout2d,
    aten.alpha_dropout_.default: nn.AlphaDropout,
    aten.feature_alpha_dropout_.default: nn.FeatureAlphaDropout,
}
RRELUS = (aten.rrelu.default, aten.rrelu_.default)
FEATURE_DROPOUTS = {3: nn.Dropout1d, 5: nn.Dropout3d}  # by the dimensions of their input


@dataclass(frozen=True)
class LiftModules(RewritePass):
    """Operators of BatchNorm, InstanceNorm, Dropout, RReLU, recurrent layers and EmbeddingBag become calls of modules.

    Attributes:
        origin: the model, whose own modules are called where the operator is theirs.
    """

    origin: nn.Module

    def rewrite(self, graph_module: fx.GraphModule) -> None:
        for node in list(graph_module.graph.nodes):
            if node.target is aten.batch_norm.default:
                self._batch_norm(graph_module, node)
            elif node.target is aten.instance_norm.default:
                self._instance_norm(graph_module, node)
            elif node.target in DROPOUTS:
                self._dropout(graph_module, node)
            elif node.target in RRELUS:
                self._rrelu(graph_module, node)
            elif (call := recurrent_call(graph_module, node)) is not None:
                self._recurrent(graph_module, node, call)
            elif node.target is aten.embedding_bag.padding_idx:
                self._embedding_bag(graph_module, node)
        graph_module.eval()  # with the containers that came for new names

    def _batch_norm(self, graph_module: fx.GraphModule, node: fx.Node) -> None:
        arguments: Any = node.args
        x, weight, bias, mean, var, training, momentum, eps, *_ = arguments
        parts = (weight, bias, mean, var)
        if training or mean is None or any(part is not None and part.op != "get_attr" for part in parts):
            return
        held = [None if part is None else attribute(graph_module, part) for part in parts]
        owner, _, buffer = str(mean.target).rpartition(".")
        for path in (owner, module_path(node)):  # others may share the statistics
            module = _submodule(self.origin, path)
            is_stock = isinstance(module, BatchNorm) and type(module).forward is BatchNorm.forward
            if module is not None and is_stock and module.eps == eps and _has_parts(module, held):
                _call(graph_module, node, path, module, (x,))
                return
        if "val" not in x.meta:
            return
        # A subclass may do more than normalise: the rest of its forward stands in the graph.
        module = _submodule(self.origin, owner)
        counter = getattr(module, "num_batches_tracked", None)
        momentum = getattr(module, "momentum", momentum)
        made = _plain_batch_norm(x.meta["val"].dim(), held, counter, momentum, eps)
        path = owner
        if buffer != "running_mean" or not owner or (isinstance(module, BatchNorm) and not _has_parts(module, held)):
            path = _new_name(graph_module, owner, "batch_norm")
        else:
            for child in graph_module.get_submodule(path).named_children():
                made.add_module(*child)
            make_way(graph_module, path, made)
        _call(graph_module, node, path, made, (x,))

    def _instance_norm(self, graph_module: fx.GraphModule, node: fx.Node) -> None:
        arguments: Any = node.args
        x, _, _, mean, *_ = arguments
        path = module_path(node)
        module = _submodule(self.origin, path)
        # Without running statistics it does the same in both modes.
        if mean is not None and isinstance(module, InstanceNorm) and has_torch_forward(module):
            _call(graph_module, node, path, module, (x,))

    def _rrelu(self, graph_module: fx.GraphModule, node: fx.Node) -> None:
        target: Any = node.target
        defaults: list[Any] = [argument.default_value for argument in target._schema.arguments]
        x, lower, upper, training = (*node.args, *defaults[len(node.args) :])[:4]
        if training:
            return  # it is drawn in eval mode too
        path = module_path(node)
        module = _submodule(self.origin, path)
        if not isinstance(module, nn.RReLU) or not has_torch_forward(module):
            path = _new_name(graph_module, path, "rrelu")
            module = nn.RReLU(lower, upper, target._schema.is_mutable).eval()
        _call(graph_module, node, path, module, (x,))

    def _dropout(self, graph_module: fx.GraphModule, node: fx.Node) -> None:
        target: Any = node.target
        arguments: Any = node.args
        x, p, training = arguments
        if training:
            return  # it is on in eval mode too
        path = module_path(node)
        module = _submodule(self.origin, path)
        if not isinstance(module, nn.modules.dropout._DropoutNd) or not has_torch_forward(module):
            path = _new_name(graph_module, path, "dropout")
            kind: Any = DROPOUTS[target]
            if kind is nn.Dropout2d and "val" in x.meta:
                kind = FEATURE_DROPOUTS.get(x.meta["val"].dim(), kind)
            module = kind(p, inplace=target._schema.is_mutable).eval()
        _call(graph_module, node, path, module, (x,))

    def _recurrent(self, graph_module: fx.GraphModule, node: fx.Node, call: RecurrentCall) -> None:
        path, _, attribute = call.weight.rpartition(".")
        own = next((name for name in (path, module_path(node)) if self._is_layer(name, call)), None)
        module = None if own is None else _submodule(self.origin, own)
        if own is not None:
            path = own
        else:
            # A subclass may do more, and a program has parameters alone: the layer is made, once for all its calls.
            if not path or attribute not in ("weight_ih", "weight_ih_l0"):
                path = _new_name(graph_module, path, "recurrent")
            module = _submodule(graph_module, path)
            if module is None or not _is_same(module, call.module):
                module = call.module
                make_way(graph_module, path, module)
        assert module is not None
        value = _call(graph_module, node, path, module, call.arguments)
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

    def _is_layer(self, path: str, call: RecurrentCall) -> bool:
        """Whether the module at a name is the recurrent layer that an operator is a call of."""
        module = _submodule(self.origin, path)
        return module is not None and is_recurrent(module) and _has_parameters_of(module, call.module)

    def _embedding_bag(self, graph_module: fx.GraphModule, node: fx.Node) -> None:
        arguments: Any = node.args
        weight, indices, offsets, scale, mode, sparse, weights, *last = arguments
        options = (scale, mode, sparse, *last)
        owner = str(weight.target).rpartition(".")[0] if weight.op == "get_attr" else ""
        table = parameter_read(graph_module, weight)
        # Bags of several modes may share a table.
        found = (name for name in (owner, module_path(node)) if _is_bag(_submodule(self.origin, name), table, options))
        path = next(found, None)
        read = [user for user in node.users if user.users]
        if path is None or len(read) > 1:
            return
        module = self.origin.get_submodule(path)
        # The operator returns (output, ...), of which nobody reads the rest, the module the output.
        value = _call(graph_module, node, path, module, (indices, offsets, weights))
        for user in list(value.users):
            if user in read and user.args[1] == 0:
                user.replace_all_uses_with(value)
            graph_module.graph.erase_node(user)


def _is_bag(module: nn.Module | None, table: Tensor | None, options: tuple[Any, ...]) -> bool:
    """Whether a module is the bag of embeddings that an operator with these options is a call of."""
    if not isinstance(module, nn.EmbeddingBag) or not has_torch_forward(module) or module.weight is not table:
        return False
    defaults: tuple[Any, ...] = (False, None)
    scale, mode, sparse, last, padding = (*options, *defaults[len(options) - 3 :])
    held = (module.scale_grad_by_freq, BAG_MODES[module.mode], module.sparse, module.include_last_offset)
    return held == (scale, mode, sparse, last) and module.padding_idx == (None if padding == -1 else padding)


def _has_parts(module: nn.Module | None, held: list[Tensor | None]) -> bool:
    """Whether a module is a BatchNorm with these weight, bias and statistics; a capture has buffers of its own."""
    if not isinstance(module, BatchNorm):
        return False
    weight, bias, *statistics = held
    buffers = zip((module.running_mean, module.running_var), statistics, strict=True)
    same = all(one is not None and other is not None and torch.equal(one, other) for one, other in buffers)
    return module.weight is weight and module.bias is bias and same


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


def _has_parameters_of(module: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same parameters."""
    held = [[id(value) for value in one.parameters()] for one in (module, other)]
    return held[0] == held[1]


def _is_same(module: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are of a class, a text and the same parameters."""
    return type(module) is type(other) and repr(module) == repr(other) and _has_parameters_of(module, other)


def _new_name(graph_module: fx.GraphModule, path: str, kind: str) -> str:
    """A name beneath ``path`` that no module called by the graph has."""
    called = {node.target for node in graph_module.graph.nodes if node.op == "call_module"}
    prefix = path and (f"{path}_" if path in called else f"{path}.")
    return next(name for number in range(len(called) + 1) if (name := f"{prefix}{kind}_{number}") not in called)


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
