"""The first stage: the caller's model is left bit for bit as it was, and the graph computes what the model does."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, build
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import tdfx
from tdfx import agreement
from tdfx.contained import quiet
from tdfx.errors import CaptureError, InputError, VerificationError, WeightError
from tdfx.passes.count import count
from tdfx.passes.shape_prop import ShapeProp
from tdfx.passes.sites import FindSites
from tdfx.records.capture import Capture
from tdfx.stages.capture import capture

EXPORTED = ("language_model", "transformer", "vit")  # what symbolic tracing does not take, or not whole
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def same(found: Any, expected: Any, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def calls(captured: Capture) -> list[str]:
    return [str(node.target) for node in captured.module.graph.nodes if node.op == "call_module"]


def reasons(captured: Capture) -> dict[str, str]:
    return {entry.layer: entry.reason for entry in captured.skipped}


# The caller's model


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """Everything a caller could see change: tensors by bits and identity, classes, modes, gradients, hooks."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return (
        [(name, id(value), value._version, value.requires_grad) for name, value in tensors],
        [value.detach().reshape(-1).view(torch.uint8).tolist() for _, value in tensors],
        [None if value.grad is None else value.grad.tolist() for _, value in tensors],
        [(name, id(part), type(part), part.training) for name, part in model.named_modules()],
        [{key: id(hook) for key, hook in hooks.items()} for part in model.modules() for hooks in hooks_of(part)],
        sorted(name for part in model.modules() for name in vars(part)),
    )


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    return [value for name, value in vars(module).items() if name.endswith("_hooks")]


class Everything(nn.Module):
    """BatchNorm, dropout, parametrized and shared layers, hooks, gradients, and submodules in different modes."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.conv = parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, padding=1))
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout()
        self.shared = parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        self.old = torch.nn.utils.spectral_norm(nn.Linear(4, 4))
        self.head = nn.Linear(4, 4)
        self.head.weight.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(1))
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.conv(x)))
        if self.branch and x.sum() > 0:
            return x
        x = self.shared(F.relu(self.shared(x))).mean((2, 3))
        return self.head(self.old(x))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("case", ["taken", "fails", "in place"])
def test_the_model_is_left_bit_for_bit_as_it_was(trainable: bool, case: str) -> None:
    model, fired = Everything(branch=case != "taken"), []
    model(X).sum().backward()
    model.norm.eval()
    model.register_forward_hook(lambda *args: fired.append("forward"))
    model.conv.register_forward_pre_hook(lambda *args: fired.append("pre"))
    model.head.register_full_backward_hook(lambda *args: fired.append("backward"))
    before, x, state = snapshot(model), X.clone(), torch.random.get_rng_state()
    if case == "fails":
        with pytest.raises(CaptureError, match=r"test_capture.py:\d+ in forward: `if self.branch and x.sum\(\) > 0:`"):
            capture(model, x, trainable=trainable, capture="fx")
    else:
        captured = capture(model, x, trainable=trainable)
        assert captured.tier == ("fx" if case == "taken" else "inplace")
        held = {value.data_ptr() for value in model.state_dict().values()}
        assert held.isdisjoint(value.data_ptr() for value in captured.module.state_dict().values())
        assert held.isdisjoint(value.data_ptr() for value in captured.original.state_dict().values())
    assert snapshot(model) == before
    assert fired == ["pre", "forward"]  # to see whether outputs depend on them
    same(x, X)
    same(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("trainable", [False, True])
def test_networks_compute_the_same(name: str, trainable: bool) -> None:
    model, args = build(name)
    before = snapshot(model.train())
    captured = capture(model, args, trainable=trainable)
    assert snapshot(model) == before
    same(captured.module(*args), model.eval()(*args), 1e-4)
    # In training, attention is written out for the dropout of its weights; the gates of recurrent layers are always.
    # A product with a weight is a layer's then, which some processors round otherwise.
    rounding = name in ("transformer", "recurrent", "functional")
    assert captured.max_rel_diff <= (1e-6 if rounding else 0.0 if trainable else 1e-5)
    assert captured.workloads == count(model, args, {})
    tier = "export" if name in EXPORTED else "fx"
    assert (captured.tier, captured.trainable, captured.args, captured.kwargs) == (tier, trainable, args, {})
    assert not any(module.training for module in captured.module.modules())


def test_the_model_as_given_is_what_is_counted_and_fingerprinted() -> None:
    model, args = build("resnet")
    captured, again = capture(model, args), capture(copy.deepcopy(model).train(), args, trainable=True)
    assert captured.original.state_dict().keys() == model.state_dict().keys()
    assert (captured.structure, captured.weights) == (again.structure, again.weights)
    with torch.no_grad():
        model.get_parameter("fc.bias").add_(1)
    changed = capture(model, args)
    assert changed.structure == captured.structure
    assert changed.weights != captured.weights


# Outputs and inputs


class Conv(nn.Module):
    """A convolution called ``conv``, for networks that differ in their forward alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)


class Apply(nn.Module):
    """A function of layers and inputs as a network."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers)

    def forward(self, *xs: Tensor) -> Any:
        return self.function(*self.layers, *xs)


def test_inputs_by_position_and_keyword() -> None:
    class Mixed(Conv):
        def forward(
            self, x: Tensor, y: Tensor | None = None, times: int = 2, *, z: Tensor, flip: bool = False, **rest: Tensor
        ) -> dict[str, Any]:
            x = self.conv(x) * times + z
            return {"sum": x if y is None else x + y, "inputs": (z, [y])}

    model, z = Mixed(), torch.ones(())
    captured = capture(model, X, {"z": z, "y": 2 * z})
    same(captured.module(X, z=z, y=2 * z), model(X, z=z, y=2 * z))
    captured = capture(model, (), {"z": z, "x": X})
    same(captured.module(z=z, x=X), model(X, z=z))


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (lambda conv, x: (conv(x), x), 2),
        (lambda conv, x: {"a": conv(x), "b": {"c": x, "d": 3, "e": None}}, 2),
        (lambda conv, x: [conv(x).argmax(1), x > 0], 2),
        (lambda conv, x: conv(x).masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf), 1),
    ],
)
def test_outputs_of_every_structure_and_dtype(function: Callable[..., Any], tensors: int) -> None:
    model = Apply(function, nn.Conv2d(3, 4, 3))
    captured = capture(model, X)
    same(captured.module(X), model(X))
    assert captured.max_rel_diff == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_folding_is_within_the_tolerance_of_every_dtype(dtype: torch.dtype) -> None:
    model, args = build("resnet")
    captured = capture(model.to(dtype), tuple(x.to(dtype) for x in args))
    assert 0 < captured.max_rel_diff < {torch.float64: 1e-12, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((X, X), r"Sequential\(input\) does not run on the example inputs \(\(2, 3, 6, 6\) torch.float32, .*TypeError"),
        (X[:, :2], r"does not run on the example inputs \(\(2, 2, 6, 6\) torch.float32\): RuntimeError"),
        ("x", "example_inputs is a str"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        capture(nn.Sequential(nn.Conv2d(3, 4, 3)), inputs)


def test_what_is_no_module_or_returns_no_tensor_is_refused() -> None:
    with pytest.raises(InputError, match=r"model is a function; expected a torch.nn.Module"):
        capture(lambda x: x, X)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="Apply returns no tensor on the example inputs"):
        capture(Apply(lambda x: 3), X)


def test_lazy_layers_that_never_ran_are_refused() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3))
    with pytest.raises(InputError, match=r"0\.weight has no shape yet: the layer is lazy; run the model once"):
        capture(model, X)
    model(X)
    assert calls(capture(model, X)) == ["0"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    model, args = build("vgg")
    model.get_parameter("features.3.bias").data[:2] = value
    with pytest.raises(
        WeightError, match=r"layer features.3: 2 of 32 values of features.3.bias are NaN or Inf; repair"
    ):
        capture(model, args)


# What tracing does not see


class Counting(Conv):
    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.conv(x) * self.steps


class Noisy(Conv):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + torch.randn(4, 4)


@pytest.mark.parametrize("network", [Counting, Noisy])
def test_a_graph_that_computes_something_else_is_refused(network: type[nn.Module]) -> None:
    with pytest.raises(
        VerificationError, match=r"output 0 of the captured graph \(\S+ differs from the model's \(\S+ by"
    ) as caught:
        capture(network(), X, capture="fx")
    assert 0.01 < caught.value.max_rel_diff < 100
    assert 0.01 < caught.value.max_abs_diff < 100


def test_a_graph_that_returns_fewer_tensors_is_refused() -> None:
    class Hiding(Conv):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (self.conv(x),) if isinstance(x, torch.fx.Proxy) else (self.conv(x), x)

    with pytest.raises(CaptureError, match="the captured graph returns 1 tensors, the model 2"):
        capture(Hiding(), X, capture="fx")
    assert capture(Hiding(), X).tier == "export"


class Watched(Conv):
    """Symbolic tracing takes another way through each of these, or none that runs."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.way == "type":
            return y.relu() if isinstance(x, Tensor) else y
        if self.way == "mode":
            return y if torch.is_grad_enabled() else y.relu()
        if self.way == "buffer":
            self.mean.copy_(y.mean())
            return y + self.mean
        if self.way == "average":
            self.mean.mul_(0.9).add_(0.1 * y.mean())
            return y + self.mean
        try:
            return y[:, 100]
        except IndexError:
            return y.relu()


@pytest.mark.parametrize("way", ["type", "mode", "buffer", "average", "exception"])
def test_what_symbolic_tracing_takes_for_something_else_goes_another_way(way: str) -> None:
    model = Watched(way).eval()
    captured = capture(model, X)
    assert captured.tier == "export" and calls(captured) == ["conv"]
    assert float(model.mean) == 0
    with torch.no_grad():
        torch.testing.assert_close(captured.module(X), model(X), rtol=0, atol=1e-6)


def hooked(hook: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    model[0].register_forward_hook(hook)
    return model


@pytest.mark.parametrize("tier", ["fx", "export", "inplace"])
def test_hooks_that_change_outputs_are_part_of_the_result(tier: str) -> None:
    model = hooked(lambda module, inputs, output: output * 2)
    captured = capture(model, X, capture=tier)
    torch.testing.assert_close(captured.module(X), model(X), rtol=0, atol=1e-5)
    assert not any("hooks" in note for note in captured.notes)
    assert capture(hooked(lambda *_: None), X).notes == ("hooks of 0 are not part of the result",)


def test_hooks_that_run_on_the_model_alone_are_left_out() -> None:
    def hook(module: nn.Module, inputs: object, output: object) -> None:
        assert module is model[0]

    model = hooked(hook)
    assert capture(model, X).notes == ("hooks of 0 are not part of the result",)


def test_weights_that_torch_computes_anew_are_told_where_they_train() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), torch.nn.utils.spectral_norm(nn.Linear(4, 4)))
    assert capture(model, torch.randn(2, 4), trainable=True).notes == (
        "0, 1: the weight itself trains, not what weight_norm or the like computed it from",
    )
    assert capture(model, torch.randn(2, 4)).notes == ()


def test_what_torchscript_hides_inside_a_model_stays() -> None:
    with pytest.warns(DeprecationWarning):
        script = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    model = nn.Sequential(OrderedDict(script=script, conv=nn.Conv2d(3, 4, 3))).eval()
    captured = capture(model, X)
    assert "conv" in calls(captured)
    torch.testing.assert_close(captured.module(X), model(X), rtol=0, atol=1e-5)


# Layers that are not seen


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding) / 2


class OwnWeight(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - x.mean(), self.bias, self.stride, self.padding)


def test_a_layer_with_a_forward_of_its_own_is_seen_if_it_computes_with_its_weight_as_it_is() -> None:
    captured = capture(nn.Sequential(OwnForward(3, 4, 3), nn.BatchNorm2d(4), OwnWeight(4, 4, 1)), X)
    assert calls(captured) == ["0", "1"]
    assert type(captured.module.get_submodule("0")) is nn.Conv2d
    assert reasons(captured) == {"1": "BatchNorm is not folded: it does not follow a convolution or linear layer"}
    _, skipped = FindSites(ShapeProp((X,)).run(captured.module)).run(captured.module)
    assert [(entry.layer, entry.reason) for entry in skipped] == [
        ("2.weight", "a parameter that sub reads; only weights of layers are compressed")
    ]


def test_modules_that_are_not_called_are_skipped() -> None:
    model = Apply(lambda used, *rest: used(rest[-1]), nn.Conv2d(3, 4, 3), nn.Linear(3, 4), nn.Sequential(nn.LSTM(3, 4)))
    found = reasons(capture(model, X))
    assert found == dict.fromkeys(
        ("layers.1", "layers.2.0"), "not called on the example inputs; give inputs on which it is"
    )


def test_layers_inside_torchs_own_blocks_are_seen() -> None:
    model, args = build("transformer")
    captured = capture(model, args)
    parts = [*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "linear1", "linear2", "norm1", "norm2"]
    assert set(calls(captured)) == {"head", *(f"encoder.layers.{index}.{part}" for index in (0, 1) for part in parts)}
    assert captured.skipped == ()


def test_a_functional_layer_on_a_parameter_is_captured_as_a_layer() -> None:
    model, args = build("functional")
    captured = capture(model, args)
    assert calls(captured) == ["first", "kernel", "last"]
    same(captured.module(*args), model(*args), 1e-6)


def test_shared_modules_and_tied_weights_stay_shared() -> None:
    linear, other = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
    other.weight = linear.weight
    model = Apply(lambda a, b, c, x: a(b(c(x))), linear, other, linear)
    captured = capture(model, X)
    assert calls(captured) == ["layers.0", "layers.1", "layers.0"]
    module = captured.module
    assert module.get_parameter("layers.0.weight") is module.get_parameter("layers.1.weight")
    same(module(X), model(X))


def test_batch_norms_that_stay_have_a_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    (entry,) = capture(model, X).skipped
    assert entry.layer == "1"
    assert entry.reason.startswith("BatchNorm is not folded: it keeps no running statistics")
    assert capture(model, X, trainable=True).skipped == ()


def test_hooks_are_noted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model[0].register_forward_hook(lambda *args: None)
    assert capture(model, X).notes == ("hooks of 0 are not part of the result",)


# Trainable


class DropPath(nn.Module):
    """Stochastic depth."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=self.training)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Identity(), nn.Conv2d(3, 4, 3), nn.Dropout(), nn.BatchNorm2d(4), nn.ReLU(), DropPath(), nn.Conv2d(4, 4, 3)
    )


def test_trainable_leaves_all_in_place() -> None:
    model = network()
    assert calls(capture(model, X)) == ["1", "4", "5", "6"]
    captured = capture(model, X, trainable=True)
    assert calls(captured) == [str(index) for index in range(7)]
    assert captured.module.state_dict().keys() == model.state_dict().keys()
    same(captured.module.state_dict(), model.state_dict())
    assert captured.notes == ()
    assert not any("batch_norm" in node.meta for node in captured.module.graph.nodes)


def test_a_trainable_graph_trains_as_the_model_does() -> None:
    model = network()
    module = capture(model, X, trainable=True).module.train()
    outputs = []
    for trained in (module, model.train()):
        torch.manual_seed(0)
        y = trained(X)
        y.square().sum().backward()
        outputs.append(y)
    same(*outputs)
    assert outputs[0].eq(model.eval()(X)).sum() < outputs[0].numel()
    for name, parameter in model.named_parameters():
        same(module.get_parameter(name).grad, parameter.grad)
    same(module.state_dict(), model.state_dict())


def test_a_forward_that_asks_for_the_mode_is_noted_when_it_must_train() -> None:
    class Asking(Conv):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.conv(x), training=self.training)

    model = nn.Sequential(Asking(), DropPath())
    (note,) = capture(model, X, trainable=True).notes
    assert note.startswith("0: forward asks for self.training; the result computes there as in eval mode")
    assert capture(model, X).notes == ()
    (note,) = capture(model[0], X, trainable=True).notes
    assert note.startswith("Asking: ")


def test_what_is_lifted_needs_no_note_on_the_mode() -> None:
    class Normalizing(Conv):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("var", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            y = F.batch_norm(self.conv(x), self.mean, self.var, training=self.training)
            return F.rrelu(F.dropout(y, training=self.training), training=self.training)

    assert capture(Normalizing(), X, trainable=True, capture="export").notes == ()


def test_padded_rows_of_fused_transformer_layers_are_noted() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    assert capture(model, x, {"src_key_padding_mask": mask}).notes == ()
    mask[0, 3:] = True
    (note,) = capture(model, x, {"src_key_padding_mask": mask}).notes
    assert note.startswith("without gradients torch runs these transformer layers fused")
    with torch.no_grad(), quiet():
        assert not model(x, src_key_padding_mask=mask)[0, 3:].any()


def test_torchs_fused_layers_that_do_not_run_are_no_matter() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return torch.nan_to_num(self.encoder(x, src_key_padding_mask=mask))

    captured = capture(Masked().eval(), (torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)))
    assert captured.notes == ()


def test_a_network_that_returns_a_finer_dtype_than_it_computes_in_is_taken() -> None:
    class Wide(Conv):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).double()

    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), Wide())
    model.train()(X)
    assert 1e-9 < capture(model.eval(), X).max_rel_diff < 1e-5
    wide = torch.ones(1).double()
    with pytest.raises(VerificationError, match=r"allowed 1e-09"):
        agreement.compare([wide], [wide + 1e-6], nn.Linear(1, 1).double())


def test_complex_outputs_are_compared_whole() -> None:
    class Spectrum(Conv):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft(self.conv(x))

    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), Spectrum())
    model.train()(X)
    assert 0 < capture(model.eval(), X).max_rel_diff < 1e-5
    with pytest.raises(VerificationError, match=r"by 10 \(2 of its largest value"):
        agreement.compare([torch.tensor([1 + 5j])], [torch.tensor([1 - 5j])], model)


class Neighbours(nn.Module):
    """Layers around a product with an adjacency matrix that is sparse. Input (4, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 16)
        self.register_buffer("adjacency", torch.eye(4).to_sparse())

    def forward(self, x: Tensor, adjacency: Tensor | None = None) -> Tensor:
        return self.last(torch.sparse.mm(self.adjacency if adjacency is None else adjacency, self.first(x)))


@pytest.mark.parametrize("tier", ["fx", "export", "inplace"])
@pytest.mark.parametrize("layout", [None, torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
def test_sparse_tensors_are_buffers_and_inputs(layout: torch.layout | None, tier: str, tmp_path: Path) -> None:
    model, x = Neighbours().eval(), torch.randn(4, 16)
    args = (x,) if layout is None else (x, torch.eye(4).flip(0).to_sparse(layout=layout))
    result = tdfx.compress(model, args, budget="flops=90%", dynamic=None, capture=tier, target=None, rank_multiple=1)
    assert [candidate.site for candidate in result.plan.candidates] == ["first", "last"]
    if layout is None:
        with pytest.raises(InputError, match=r"adjacency is of layout torch.sparse_coo, which safetensors does not"):
            tdfx.save(result, tmp_path / "saved")


def test_a_captured_graph_is_pickled_copied_and_captured_again() -> None:
    model, args = build("mobilenet")
    module = capture(model, args).module
    expected = module(*args)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), capture(module, args).module):
        same(other(*args), expected)
        assert list(other.state_dict()) == list(module.state_dict())
