"""Capture of what symbolic tracing does not take: which tier is chosen, what it sees, and what its result can do."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import copy
import functools
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exported_networks import EXPORTED, Kwargs, LastOutput, Prediction, build
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from tdfx.contained import plain_attention, quiet
from tdfx.errors import CaptureError, InputError
from tdfx.passes.capture import has_stock_forward
from tdfx.records.capture import Capture
from tdfx.stages.capture import capture

TRACED = ("guarded", "both_ways", "two_strides", "computed_bias")  # what symbolic tracing takes whole
NAMES = sorted(EXPORTED)
X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _plain_attention() -> Iterator[None]:
    with plain_attention():
        yield


@functools.cache
def trained(name: str) -> Capture:
    """A capture that is only read."""
    model, args, kwargs = build(name)
    return capture(model, args, kwargs, trainable=True)


def layers(captured: Capture) -> set[str]:
    called = {str(node.target) for node in captured.plain.graph.nodes if node.op == "call_module"}
    return {name for name in called if has_stock_forward(captured.plain.get_submodule(name))}


def rounding(captured: Capture) -> float:
    """Of recurrent layers whose gates are computed apart; nothing else is computed otherwise."""
    return 0.0 if captured.module is captured.plain else 1e-6


def same(found: Any, expected: Any, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def outputs(model: nn.Module, args: tuple[Tensor, ...], kwargs: Kwargs) -> list[Any]:
    return torch.utils._pytree.tree_leaves(model(*args, **kwargs))


# What is seen


@pytest.mark.parametrize("name", NAMES)
def test_every_convolution_and_linear_layer_is_seen_without_difference(name: str) -> None:
    captured = trained(name)
    assert captured.tier == ("fx" if name in TRACED else "export")
    assert layers(captured) == EXPORTED[name].layers
    assert captured.max_rel_diff <= rounding(captured)
    assert not any(module.training for module in captured.module.modules())


@pytest.mark.parametrize("name", NAMES)
def test_weights_keep_their_names_and_values(name: str) -> None:
    original, module = trained(name).original, trained(name).module
    for layer in EXPORTED[name].layers & {path for path, _ in original.named_modules()}:
        found, given = module.get_parameter(f"{layer}.weight"), original.get_parameter(f"{layer}.weight")
        same(found, given.T if name == "gpt" and layer.startswith("c_") else given)


def test_tied_weights_stay_tied() -> None:
    module = trained("gpt").module
    assert module.get_parameter("lm_head.weight") is module.get_parameter("wte.weight")


def test_layers_that_are_not_called_are_skipped_with_a_reason() -> None:
    assert {entry.layer: entry.reason for entry in trained("unused").skipped} == {
        "never": "not called on the example inputs; give inputs on which it is"
    }


def test_symbolic_tracing_is_kept_where_it_sees_as_much() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    assert capture(model, X).tier == "fx"


@fx.wrap
def where_positive(x: Tensor, layer: nn.Module) -> Tensor:
    """The layer's output if there is something positive, which tracing does not look into."""
    return layer(x) if x.sum() > -1e6 else x


class Wrapped(nn.Module):
    """A layer that is called inside a function that tracing takes for one operation, and one that is called itself."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.seen = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.seen(where_positive(x, self.hidden))


class Asked(Wrapped):
    """The same; the hidden layer's class is asked for, so that nothing can stand in for it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.seen(where_positive(x, self.hidden) * isinstance(self.hidden, nn.Linear))


def test_where_export_fails_the_way_that_sees_more_layers_is_taken() -> None:
    captured = capture(Wrapped().eval(), X)
    assert captured.tier == "inplace"
    assert (
        "symbolic tracing does not see all layers, and Wrapped cannot be captured by torch.export" in captured.notes[0]
    )
    captured = capture(Asked().eval(), X)
    assert captured.tier == "fx"
    assert captured.notes[0].startswith("symbolic tracing does not see all layers, and Asked cannot be captured")


def test_a_folded_capture_is_of_the_same_numbers() -> None:
    model, args, kwargs = build("regularized")
    captured = capture(model, args, kwargs)
    kinds = {type(module).__name__ for module in captured.module.modules()}
    assert not {kind for kind in kinds if "Dropout" in kind or kind == "BatchNorm2d"}
    assert captured.max_rel_diff <= 1e-6
    assert [entry.layer for entry in captured.skipped] == ["norm3"]


# The batch


@pytest.mark.parametrize("name", sorted(EXPORTED.keys() - {"fixed_batch"}))
def test_the_batch_is_free(name: str) -> None:
    model, args, kwargs = build(name, batch=5)
    assert not any(note.startswith("the batch size is fixed") for note in trained(name).notes)
    same(outputs(trained(name).plain, args, kwargs), outputs(model, args, kwargs))


@pytest.mark.parametrize("name", ["bert", "seq2seq", "shape_dependent"])
def test_an_example_batch_of_1_leaves_the_batch_free(name: str) -> None:
    model, args, kwargs = build(name, batch=1)
    captured = capture(model, args, kwargs, trainable=True)
    assert captured.args == args
    assert layers(captured) == EXPORTED[name].layers
    for batch in (1, 3):
        args, kwargs = EXPORTED[name].inputs(batch)
        same(outputs(captured.module, args, kwargs), outputs(model, args, kwargs))


def test_a_batch_that_cannot_be_free_is_noted() -> None:
    (note,) = trained("fixed_batch").notes
    assert note.startswith("the batch size is fixed: with a free one torch.export says UserError: Constraints violated")


# What a result can do


class Positions(nn.Module):
    """A buffer outside of the state dict, and positions made in forward. Input (batch, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("scale", torch.rand(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.scale) + torch.arange(6, device=x.device)


@pytest.mark.parametrize("tier", ["fx", "export"])
def test_copies_have_the_same_state_dict_and_make_the_same_tensors(tier: str) -> None:
    module = capture(Positions().eval(), X, capture=tier).module
    copies = [copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    for other in (*copies, pickle.loads(pickle.dumps(copies[-1])), copy.deepcopy(copies[-1])):
        other.load_state_dict(module.state_dict())
        same(other(X), module(X))
        targets = [sorted(str(node.target) for node in part.graph.nodes) for part in (other, module)]
        assert targets[0] == targets[1]
        assert copy.deepcopy(other).to("meta")(X.to("meta")).device.type == "meta"


@pytest.mark.parametrize("name", NAMES)
def test_a_result_is_pickled_copied_and_trained(name: str) -> None:
    _, args, kwargs = build(name)
    module = trained(name).module
    expected = module(*args, **kwargs)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        found = other(*args, **kwargs)
        assert type(found) is type(expected)
        same(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected))
        assert dict(other.named_parameters()).keys() == dict(module.named_parameters()).keys()
        assert not any(part.training for part in other.modules())
        leaves = outputs(other.train(), args, kwargs)
        sum(y.square().sum() for y in leaves if isinstance(y, Tensor) and y.requires_grad).backward()  # type: ignore[union-attr]
        called = {str(node.target) for node in other.graph.nodes if node.op == "call_module" and node.users}
        assert all(other.get_parameter(f"{path}.weight").grad is not None for path in layers(trained(name)) & called)


def test_outputs_keep_their_containers() -> None:
    _, args, kwargs = build("bert")
    assert type(trained("bert").module(*args, **kwargs)) is LastOutput
    model, args, kwargs = build("nested")
    found = trained("nested").module(*args, **kwargs)
    assert isinstance(found["record"], Prediction)
    assert isinstance(found["pair"], tuple)
    assert isinstance(found["pair"][1], list)
    assert (found["none"], found["number"]) == (None, 3)
    assert found.keys() == model(*args, **kwargs).keys()


def test_buffers_that_forward_updates_stay() -> None:
    _, args, kwargs = build("counting")
    captured = trained("counting")
    module = copy.deepcopy(captured.module)
    before = copy.deepcopy(module.state_dict())
    module(*args, **kwargs)
    same(module.state_dict(), before)
    assert "calls: forward updates this buffer in eval mode; the result does not" in captured.notes


# The caller's model and inputs


def snapshot(model: nn.Module) -> list[Any]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [
        [(name, id(value), value._version, value.requires_grad) for name, value in tensors],
        [value.detach().reshape(-1).tolist() for _, value in tensors],
        [(name, id(part), type(part), part.training, sorted(vars(part))) for name, part in model.named_modules()],
        [{key: id(hook) for key, hook in part._forward_hooks.items()} for part in model.modules()],
    ]


@pytest.mark.parametrize("name", ["bert", "seq2seq", "counting", "fixed_batch", "regularized"])
def test_the_model_and_its_inputs_are_left_as_they_were(name: str) -> None:
    model, args, kwargs = build(name)
    model.train()
    fired: list[Any] = []
    next(iter(model.children())).register_forward_hook(lambda *_: fired.append(1))
    before, given = snapshot(model), [value.clone() for value in (*args, *kwargs.values())]
    state = torch.random.get_rng_state()
    captured = capture(model, args, kwargs, trainable=True)
    assert snapshot(model) == before
    assert len(fired) <= 2  # one run, to see whether outputs depend on them
    same([*args, *kwargs.values()], given)
    assert all(vars(value) == {} for value in (*args, *kwargs.values()))
    same(torch.random.get_rng_state(), state)
    held = {value.data_ptr() for value in model.state_dict().values()}
    assert held.isdisjoint(value.data_ptr() for value in captured.module.state_dict().values())


class Gathering(nn.Module):
    """A network that returns what its own hooks saw."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.seen: list[Tensor] = []
        self.body.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.clear()
        y = self.head(F.relu(self.body(x)))
        return y, self.seen[0]


def test_hooks_that_gather_outputs_are_kept() -> None:
    model = Gathering().eval()
    captured = capture(model, X)
    assert layers(captured) == {"body", "head"}
    assert captured.max_rel_diff == 0.0
    assert captured.notes == ()
    assert model.seen == []
    assert len(model.body._forward_hooks) == 1
    other = torch.randn(3, 6)
    same(captured.module(other), model(other))


class GatheringWhenAsked(nn.Module):
    """A network that sets up hooks in its first run that asks for what they see, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.has_hooks = nn.Linear(6, 6), nn.Linear(6, 4), False

    def forward(self, x: Tensor, hidden: bool = False) -> dict[str, Any]:
        seen: list[Tensor] = []
        if hidden and not self.has_hooks:
            self.body.register_forward_hook(lambda module, args, output: module.seen.append(output))
            self.has_hooks = True
        self.body.seen = seen  # type: ignore[assignment]
        return {"y": self.head(self.body(x)), "seen": tuple(seen)}


@pytest.mark.parametrize("was_asked", [False, True])
def test_hooks_that_a_model_sets_up_when_it_runs_gather_once(was_asked: bool) -> None:
    model = GatheringWhenAsked().eval()
    if was_asked:
        model(X, hidden=True)
    captured = capture(model, None, {"x": X, "hidden": True}, capture="export")
    assert not any("hooks" in note for note in captured.notes)
    found = captured.module(X)
    same([found["y"], *found["seen"]], [model(X)["y"], model.body(X)])


def test_hooks_beside_empty_outputs_are_removed_where_they_gather_nothing() -> None:
    fired: list[int] = []
    model = GatheringWhenAsked().eval()
    model.head.register_forward_hook(lambda *_: fired.append(1))
    assert capture(model, X).notes == ("hooks of head are not part of the result",)


# Exported programs


@functools.cache
def program(name: str = "shape_dependent") -> ExportedProgram:
    model, args, kwargs = build(name)
    with quiet():
        return torch.export.export(model, args, kwargs, dynamic_shapes=({0: Dim.DYNAMIC},), strict=False)


def decomposed() -> ExportedProgram:
    with quiet():
        return program().run_decompositions()


def saved(folder: Path) -> Path:
    torch.export.save(program(), folder / "model.pt2")
    return folder / "model.pt2"


FORMS: dict[str, Callable[[Path], Any]] = {
    "program": lambda folder: program(),
    "decomposed program": lambda folder: decomposed(),
    "graph module": lambda folder: program().module(),
    "graph module without guards": lambda folder: program().module(check_guards=False),
    "path": saved,
    "string": lambda folder: str(saved(folder)),
}


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # torch's, on copying such a graph
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [2, 4])
def test_an_exported_model_is_captured_in_every_form(form: str, batch: int, tmp_path: Path) -> None:
    model, args, _ = build("shape_dependent", batch=batch)
    captured = capture(FORMS[form](tmp_path), args, trainable=True)
    assert layers(captured) == EXPORTED["shape_dependent"].layers
    assert captured.max_rel_diff == 0.0
    same(captured.module(*args), model(*args))
    (other,), _ = EXPORTED["shape_dependent"].inputs(7)
    same(captured.module(other), model(other))
    same(pickle.loads(pickle.dumps(captured.module))(other), model(other))


@pytest.mark.parametrize("form", ["program", "path"])
def test_an_exported_program_brings_its_own_inputs(form: str, tmp_path: Path) -> None:
    _, args, _ = build("shape_dependent")
    captured = capture(FORMS[form](tmp_path))
    same(captured.args, args)
    assert captured.tier == "export"
    assert layers(captured) == EXPORTED["shape_dependent"].layers


def test_a_program_without_inputs_asks_for_them() -> None:
    bare = copy.copy(program())
    bare.example_inputs = None
    with pytest.raises(InputError, match="example_inputs is a NoneType"):
        capture(bare)


@pytest.mark.parametrize("name", ["regularized", "recurrent", "gpt"])
def test_an_exported_program_trains_as_far_as_it_says(name: str) -> None:
    model, args, kwargs = build(name)
    captured = capture(program(name), args, kwargs, trainable=True)
    assert captured.max_rel_diff <= rounding(captured)
    assert layers(captured) >= EXPORTED[name].layers
    kinds = [type(module).__name__ for module in captured.module.modules()]
    assert kinds.count("BatchNorm2d") == (2 if name == "regularized" else 0)
    (other,), _ = EXPORTED[name].inputs(3)
    same(outputs(captured.plain, (other,), {}), outputs(model, (other,), {}))


def test_programs_and_modules_share_nothing_with_the_capture() -> None:
    before = copy.deepcopy(program().state_dict)
    module = capture(program()).module
    with torch.no_grad():
        for value in module.parameters():
            value.add_(1)
    same(dict(program().state_dict), dict(before))


# Failures


class Neither(nn.Module):
    """Control flow on values, which no tier takes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return self.linear(x)


def test_a_note_says_why_both_tiers_with_a_graph_fail() -> None:
    captured = capture(Neither(), -X.abs())
    assert captured.tier == "inplace"
    (note,) = captured.notes
    assert re.match(
        r"(?s)captured in place.* tracing at test_tiers.py:\d+ in forward: `if x.sum\(\) > 0.*torch.export \(", note
    )


class Straight(torch.autograd.Function):
    """The sign, with the gradient of the identity."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient


class Through(nn.Module):
    """Layers around something. Input (batch, 6)."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(6, 6), nn.Linear(6, 4), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first, x))


def signs(layer: nn.Module, x: Tensor) -> Tensor:
    return Straight.apply(layer(x))


def frozen(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x).relu()


@pytest.mark.parametrize("between", [signs, frozen])
def test_gradients_of_forwards_own_are_kept_where_a_result_is_to_train(between: Callable[..., Tensor]) -> None:
    model = Through(between).eval()
    captured = capture(model, X, trainable=True)
    assert captured.tier == "inplace"
    assert "the graph's gradients at first.bias, first.weight are not the model's" in captured.notes[0]
    for tier in ("fx", "export"):
        (note,) = capture(model, X, trainable=True, capture=tier).notes
        assert note.endswith("which a graph does not hold; capture='inplace' trains as the model does")
    assert capture(model, X).tier == "fx"


def test_gradients_that_stop_in_a_graph_too_are_the_same() -> None:
    captured = capture(Through(lambda layer, x: layer(x).detach()).eval(), X, trainable=True)
    assert (captured.tier, captured.notes) == ("fx", ())


CAUGHT: dict[str, Callable[[Tensor], bool]] = {
    "a truth": lambda y: bool(y.mean() > 0),
    "a float": lambda y: float(y.mean()) > 0,
    "an item": lambda y: y.mean().item() > 0,
    "an integer": lambda y: int(y.mean() * 100) > 0,
    "a loop": lambda y: sum(1.0 for row in y for value in row if value > 0) > 6,
}


class Catching(nn.Module):
    """Catches what tracing says of a decision on values, and goes on. Input (batch, 6)."""

    def __init__(self, decide: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.first, self.last, self.decide = nn.Linear(6, 6, bias=False), nn.Linear(6, 4), decide

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        try:
            if self.decide(y):
                y = y * 2
        except (TypeError, ValueError, RuntimeError):
            pass
        return self.last(y)


@pytest.mark.parametrize("name", CAUGHT)
def test_a_decision_on_values_is_none_of_a_graphs_though_forward_catches_the_error(name: str) -> None:
    model = Catching(CAUGHT[name]).eval()
    low = X if model.first(X).mean() < 0 else -X
    captured = capture(model, low)
    assert captured.tier == "inplace"
    with torch.no_grad():
        for x in (low, -low):
            same(captured.module(x), model(x))
    for tier in ("fx", "export"):
        with pytest.raises(CaptureError, match=f"capture='{tier}'"):
            capture(model, low, capture=tier)


class Duck(nn.Module):
    """Catches what tracing says of a size. Input (batch, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        try:
            rows = int(x.shape[0])
        except TypeError:
            rows = x.shape[0]
        return self.linear(x).reshape(rows, 2, 3)


def test_sizes_that_tracing_keeps_are_no_decision() -> None:
    model = Duck().eval()
    captured = capture(model, X)
    assert captured.tier == "fx"
    same(captured.module(torch.cat([X, X])), model(torch.cat([X, X])))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Linear(6, 4)), torch.arange(6).reshape(2, 3)),
        (Through(lambda layer, x: torch.sqrt(layer(x) ** 2 * (x > 0))), X),  # whose gradients are not finite
    ],
)
def test_gradients_that_are_sparse_or_not_finite_are_no_reason_to_go_in_place(model: nn.Module, x: Tensor) -> None:
    captured = capture(model.eval(), x, trainable=True)
    assert (captured.tier, captured.notes) == ("fx", ())


class OpaqueBlock(nn.Module):
    """A layer that is seen, and torch's encoder around values that torch.export does not take."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.flow = ValueFlow()
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.flow(self.encoder(x, src_key_padding_mask=padding)))


class ValueFlow(nn.Module):
    """Control flow on values in a module that symbolic tracing takes for a leaf."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training or float(x.detach().sum()) != 0.5 else -x


def test_torchs_encoder_around_what_torch_export_does_not_take_is_captured_in_place() -> None:
    torch.backends.mha.set_fastpath_enabled(True)  # as users have it
    model = OpaqueBlock().eval()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    x = torch.randn(2, 5, 16)
    captured = capture(model, (x, padding))
    assert captured.tier == "inplace"
    assert captured.skipped == ()
    with plain_attention():
        same(captured.module(x, padding), model(x, padding))
