"""Takes the input weights of recurrent layers out, as linear layers in front of them, and puts them back.

While a network is analysed, a layer of an nn.LSTM, nn.GRU or nn.RNN (or a cell) is a Linear that computes the input
part of its gates, for both directions at once, and a core that goes on from there (see ``recurrent``). The Linear is
compressed as any other: its inputs are seen, and the gradients at the gates too. Its error is that of the input part of
the gates, before any nonlinearity. Of the chain W ~ A B + b, the last layer goes back into the recurrent layer: what is
left is B, and a plain recurrent layer with input weights A and input biases b. Recurrent weights stay as they are:
low-rank ones would have to be unrolled over time.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from tdfx.errors import PassError
from tdfx.passes.base import AnalysisPass, RewritePass, set_submodule
from tdfx.passes.drop_unread import DropUnread
from tdfx.passes.recurrent import (
    BIAS,
    WEIGHT,
    Recurrent,
    core,
    input_layer,
    is_core,
    is_recurrent,
    suffixes,
    with_input,
)
from tdfx.passes.shape_prop import TensorMeta
from tdfx.passes.sharing import sharers

RECURRENCE = "its recurrent weights are not compressed: low-rank ones would have to be unrolled over time"


def obstacle(graph_module: fx.GraphModule, name: str, metas: Mapping[str, TensorMeta]) -> str | None:
    """Why the input weights of a recurrent layer cannot be taken out, None if they can.

    Args:
        graph_module: the graph.
        name: of the layer; a core says why its own weights stay.
        metas: shapes by node name, as ``ShapeProp`` returns them.
    """
    module = cast(Recurrent, graph_module.get_submodule(name))
    if is_core(module):
        return RECURRENCE
    kind = type(module).__name__
    others = sharers(graph_module, name)
    if others:
        return (
            f"it shares parameters with {', '.join(others)}; a chain for one of them would break the tie; give it a "
            "copy of its own"
        )
    if module._buffers:
        return f"{' and '.join(module._buffers)} of this {kind} are buffers; expected parameters"
    tensors = list(module.parameters())
    if len(tensors) != sum(1 for _ in module.named_parameters(remove_duplicate=False)):
        return f"layers or directions of this {kind} share parameters; a chain for one of them would break the tie"
    if len({(tensor.dtype, tensor.device) for tensor in tensors}) > 1:
        return f"the parameters of this {kind} are of several dtypes or devices"
    if any(_given(node)[0].name not in metas for node in _calls(graph_module, name)):
        return f"this {kind} is called on a packed sequence; call it on tensors"
    return None


@dataclass(frozen=True)
class UnpackableLayers(AnalysisPass[frozenset[str]]):
    """Names of the recurrent layers that ``UnpackRecurrent`` can take apart.

    Attributes:
        metas: shapes by node name, as ``ShapeProp`` returns them.
    """

    metas: Mapping[str, TensorMeta]

    def apply(self, graph_module: fx.GraphModule) -> frozenset[str]:
        layers = [name for name in _called(graph_module) if is_recurrent(graph_module.get_submodule(name))]
        return frozenset(name for name in layers if obstacle(graph_module, name, self.metas) is None)


@dataclass(frozen=True)
class UnpackRecurrent(RewritePass):
    """Every call of a recurrent layer becomes calls of ``{name}.ih_l{i}``, a Linear, and ``{name}.l{i}``, a core.

    Of a cell, ``{name}.ih`` and ``{name}.cell``.

    Attributes:
        names: of the recurrent layers, as ``UnpackableLayers`` finds them; other names are passed over.
        trainable: keep the dropout between layers, as modules.
    """

    names: frozenset[str]
    trainable: bool = False

    def rewrite(self, graph_module: fx.GraphModule) -> None:
        wanted = [name for name in _called(graph_module) if name in self.names]
        layers = [name for name in wanted if is_recurrent(graph_module.get_submodule(name))]
        for name in layers:
            self._unpack(graph_module, name, cast(Recurrent, graph_module.get_submodule(name)))
        if layers:
            DropUnread().rewrite(graph_module)  # states that nobody reads

    def _unpack(self, graph_module: fx.GraphModule, name: str, module: Recurrent) -> None:
        calls = _calls(graph_module, name)
        holder = nn.Module()
        for layer, (first, second) in enumerate(_names(module)):
            holder.add_module(first, input_layer(module, layer))
            holder.add_module(second, core(module, layer))
        dropout = module.dropout if isinstance(module, nn.RNNBase) and module.num_layers > 1 and self.trainable else 0.0
        if dropout:
            holder.add_module("dropout", nn.Dropout(dropout))
        set_submodule(graph_module, name, holder.train(graph_module.training))
        for node in calls:
            value, state = _given(node)
            with graph_module.graph.inserting_before(node):
                found = _Stack(graph_module.graph, name, module, bool(dropout)).call(value, state)
            _hand_on(graph_module.graph, node, found)


@dataclass(frozen=True)
class _Stack:
    """Writes the calls of a recurrent layer's layers into a graph."""

    graph: fx.Graph
    name: str
    module: Recurrent
    dropout: bool

    def call(self, value: fx.Node, state: Any) -> Any:
        """What the module returns: a node, or a tuple of what it returns."""
        names = _names(self.module)
        if len(names) == 1:
            return self._layer(names[0], value, state)
        finals = []
        for index, pair in enumerate(names):
            if index and self.dropout:
                value = self.graph.call_module(f"{self.name}.dropout", (value,))
            called = self._layer(pair, value, self._of_layer(state, index))
            value = self._item(called, 0)
            finals.append(self._item(called, 1))
        if not isinstance(self.module, nn.LSTM):
            return value, self.graph.call_function(torch.cat, (finals,))
        parts = [[self._item(final, index) for final in finals] for index in (0, 1)]
        return value, tuple(self.graph.call_function(torch.cat, (part,)) for part in parts)

    def _layer(self, names: tuple[str, str], value: fx.Node, state: Any) -> fx.Node:
        first, second = names
        gates = self.graph.call_module(f"{self.name}.{first}", (value,))
        return self.graph.call_module(f"{self.name}.{second}", (gates,) if state is None else (gates, state))

    def _of_layer(self, state: Any, index: int) -> Any:
        """Initial states of one layer; those of all layers and directions are stacked in the first dimension."""
        if state is None:
            return None
        if isinstance(self.module, nn.LSTM):
            return tuple(self._slice(self._item(state, part), index) for part in (0, 1))
        return self._slice(state, index)

    def _slice(self, value: Any, index: int) -> Any:
        directions = len(suffixes(self.module))
        return self._item(value, slice(index * directions, (index + 1) * directions))

    def _item(self, value: Any, index: Any) -> Any:
        if isinstance(value, tuple | list):
            return value[index]
        return self.graph.call_function(operator.getitem, (value, index))


@dataclass(frozen=True)
class PackRecurrent(RewritePass):
    """Every core takes in the linear layer before it and becomes a plain recurrent layer."""

    def rewrite(self, graph_module: fx.GraphModule) -> None:
        for name in _cores(graph_module):
            calls = _calls(graph_module, name)
            linear, _ = _only_feeder(graph_module, name)
            module = cast(Recurrent, graph_module.get_submodule(name))
            set_submodule(graph_module, name, with_input(module, linear))
            for node in calls:
                before = node.all_input_nodes[0]
                node.replace_input_with(before, before.all_input_nodes[0])
                graph_module.graph.erase_node(before)


def unpacked_state(graph_module: fx.GraphModule, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of what ``PackRecurrent`` makes of a graph as one of that graph; cores without a state are left out.

    Args:
        graph_module: the graph, which has cores.
        state: tensors by their names after packing.
    """
    found = dict(state)
    for name in _cores(graph_module):
        _, feeder = _only_feeder(graph_module, name)
        ends = suffixes(cast(Recurrent, graph_module.get_submodule(name)))
        for kind, attribute in ((WEIGHT, "weight"), (BIAS, "bias")):
            parts = [state.get(f"{name}.{kind}{suffix}") for suffix in ends]
            if all(isinstance(part, Tensor) for part in parts):
                found[f"{feeder}.{attribute}"] = torch.cat(cast(list[Tensor], parts))
                for suffix in ends:
                    del found[f"{name}.{kind}{suffix}"]
    return found


def without_biases(graph_module: fx.GraphModule) -> frozenset[str]:
    """Names of the linear layers before cores without biases: a bias that a chain gained would have no place there."""
    cores = [name for name in _cores(graph_module) if not cast(Recurrent, graph_module.get_submodule(name)).bias]
    return frozenset(_only_feeder(graph_module, name)[1] for name in cores)


def feeders(graph_module: fx.GraphModule) -> dict[str, str]:
    """Names of the linear layers that come before cores, by name of the core."""
    return {name: _only_feeder(graph_module, name)[1] for name in _cores(graph_module)}


def packed_name(site: str) -> str:
    """The recurrent layer that a linear layer of this name would be of."""
    return site.rpartition(".")[0]


def _names(module: Recurrent) -> tuple[tuple[str, str], ...]:
    if isinstance(module, nn.RNNCellBase):
        return (("ih", "cell"),)
    return tuple((f"ih_l{layer}", f"l{layer}") for layer in range(module.num_layers))


def _calls(graph_module: fx.GraphModule, name: str) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.op == "call_module" and node.target == name]


def _called(graph_module: fx.GraphModule) -> list[str]:
    return list(dict.fromkeys(str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"))


def _given(node: fx.Node) -> tuple[fx.Node, Any]:
    """Input and initial state of a call; None where that is left out."""
    named = dict(zip(("input", "hx"), node.args, strict=False)) | dict(node.kwargs)
    return cast(fx.Node, named["input"]), named.get("hx")


def _cores(graph_module: fx.GraphModule) -> list[str]:
    return [name for name in _called(graph_module) if is_core(graph_module.get_submodule(name))]


def _only_feeder(graph_module: fx.GraphModule, name: str) -> tuple[nn.Linear, str]:
    """The linear layer that all calls of a core come after, and its name."""
    before = [node.all_input_nodes[0] for node in _calls(graph_module, name)]
    names = {str(node.target) for node in before if node.op == "call_module" and len(node.users) == 1}
    linear = graph_module.get_submodule(names.pop()) if len(names) == 1 else None
    has_bias = cast(Recurrent, graph_module.get_submodule(name)).bias
    if not isinstance(linear, nn.Linear) or has_bias != (linear.bias is not None):
        wanted = "a" if has_bias else "no"
        raise PassError(f"{name} is not called on what one linear layer with {wanted} bias returns")
    return linear, str(before[0].target)


def _hand_on(graph: fx.Graph, node: fx.Node, value: Any) -> None:
    """Users of a node read a value instead: a node, or a tuple of such, items of which are read directly."""
    if isinstance(value, fx.Node):
        value.meta.update(node.meta)
        node.replace_all_uses_with(value)

    def instead(read: fx.Node) -> Any:
        return value if read is node else read

    for user in list(node.users):
        if user.target is operator.getitem and isinstance(user.args[1], int):
            _hand_on(graph, user, value[user.args[1]])
        else:
            user.args = fx.node.map_arg(user.args, instead)
            user.kwargs = fx.node.map_arg(user.kwargs, instead)
    graph.erase_node(node)
