"""Removes operators whose value nobody reads, as attention weights that are computed and thrown away."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from tdfx.passes.base import RewritePass

_WRITING = (
    operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul, operator.itruediv,
    operator.ifloordiv, operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul,
    operator.ilshift, operator.irshift,
)  # fmt: skip


@dataclass(frozen=True)
class DropUnread(RewritePass):
    """Reads of parameters, operators and functions of torch go if they are unread; what may have an effect stays."""

    def rewrite(self, graph_module: fx.GraphModule) -> None:
        graph_module.graph.eliminate_dead_code(is_impure_node=may_have_effect)


def may_have_effect(node: fx.Node) -> bool:
    """Whether a node may do something besides computing its value; False only where it is sure."""
    if node.op == "get_attr":
        return False
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op != "call_function" or "out" in node.kwargs or node.target in _WRITING:
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if any(value is True for value in (*node.args, *node.kwargs.values())):
        return True  # that may be inplace or training
    name = getattr(node.target, "__name__", "_")
    module = getattr(node.target, "__module__", None) or "torch"
    known = module.partition(".")[0] in ("torch", "_operator", "math") or node.target is getattr
    return not known or name.startswith("_") or name.endswith("_")
