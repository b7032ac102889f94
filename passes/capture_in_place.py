"""Capture without a graph: the model's own forward stays Python code, around layers that can be replaced."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tdfx.passes.fold_batch_norm import BatchNorm
from tdfx.passes.in_place import FIXED, InPlace, sharing
from tdfx.passes.layer_calls import is_layer
from tdfx.passes.shape_prop import ShapeProp, bind
from tdfx.passes.stand_in import fixed_layers
from tdfx.records.layer import Skipped

NOT_CALLED = "not called on the example inputs; give inputs on which it is"


def capture_in_place(model: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> InPlace:
    """An isolated model, its parameters shared, as a graph of one node for calls with such inputs."""
    module = InPlace.of(sharing(model), len(args), kwargs)
    module.meta[FIXED] = fixed_layers(model, args, kwargs)
    return module


def not_called(module: InPlace, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> tuple[Skipped, ...]:
    """Weights that forward reads without calling a layer, or does not come to on these inputs."""
    calls = ShapeProp(bind(module, args, kwargs)).run(module).calls
    found = []
    for name, part in module.root.named_modules():
        weights = [key for key, weight in part.named_parameters(recurse=False) if weight.dim() >= 2]
        if not weights or name in calls:
            continue
        if not name or not is_layer(part) or isinstance(part, nn.ParameterList | nn.ParameterDict):
            reason = f"a parameter of {type(part).__name__}, not of a layer; only weights of layers are compressed"
            found += [Skipped(f"{name}.{key}" if name else key, reason) for key in weights]
        else:
            found.append(Skipped(name, module.meta[FIXED].get(name) or NOT_CALLED))
    return tuple(found)


def kept_batch_norms(model: nn.Module) -> tuple[str, ...]:
    """A note on BatchNorms, if there are any."""
    count = sum(isinstance(module, BatchNorm) for module in model.modules())
    which = "BatchNorm is" if count == 1 else f"{count} BatchNorms are"
    return (f"{which} not folded into the layers before: that takes a graph",) if count else ()
