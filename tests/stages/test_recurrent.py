"""Recurrent networks from end to end: moments, errors, costs, results, files."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from calibrated import assert_site
from torch import Tensor, nn

import tdfx
from tdfx.chains import solve
from tdfx.passes.candidates import site_weight
from tdfx.passes.shape_prop import ShapeProp
from tdfx.records.capture import Capture
from tdfx.scoring import scoring_of
from tdfx.stages.capture import capture

BATCH, LENGTH, WORDS, WIDTH, HIDDEN, TAGS = 3, 6, 40, 24, 16, 5


class Tagger(nn.Module):
    """Tokens (batch, length) to tags (batch, length, 5) through recurrent layers of all kinds."""

    def __init__(self, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        options: dict[str, Any] = {"batch_first": True, "bidirectional": True, "bias": bias}
        self.lstm = nn.LSTM(WIDTH, HIDDEN, 2, dropout=dropout, **options)
        self.gru = nn.GRU(2 * HIDDEN, HIDDEN, **options)
        self.rnn = nn.RNN(2 * HIDDEN, HIDDEN, nonlinearity="relu", batch_first=True, bias=bias)
        self.head = nn.Linear(HIDDEN, TAGS)

    def forward(self, tokens: Tensor) -> Tensor:
        y, (h, _) = self.lstm(self.embed(tokens))
        y, _ = self.gru(y)
        return self.head(self.rnn(y)[0] + h.mean(0).unsqueeze(1))


class Translator(nn.Module):
    """An encoder and a decoder that reads its own words, as many as it was given, which takes torch.export."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.encoder = nn.GRU(WIDTH, WIDTH, 2, batch_first=True)
        self.decoder = nn.LSTMCell(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        _, last = self.encoder(self.embed(tokens))
        state, word, scores = (last[0], last[1]), tokens[:, 0], []
        for _ in range(tokens.shape[1]):
            state = self.decoder(self.embed(word), state)
            scores.append(self.head(state[0]))
            word = scores[-1].argmax(-1)
        return torch.stack(scores, 1)


class Unrolled(nn.Module):
    """An LSTM or GRU in both directions, written out step by step after a Linear for the gates."""

    def __init__(self, rnn: nn.LSTM | nn.GRU) -> None:
        super().__init__()
        self.ends, self.is_lstm = ("_l0", "_l0_reverse"), isinstance(rnn, nn.LSTM)
        self.hidden = nn.ParameterDict({name: value for name, value in rnn.named_parameters() if "_hh_" in name})
        self.gates = nn.Linear(rnn.input_size, 2 * len(rnn.weight_ih_l0))
        self.gates.weight.data = torch.cat([getattr(rnn, f"weight_ih{end}") for end in self.ends])
        self.gates.bias.data = torch.cat([getattr(rnn, f"bias_ih{end}") for end in self.ends])

    def forward(self, x: Tensor) -> Tensor:
        halves = self.gates(x).chunk(2, -1)
        outputs = []
        for end, given, order in zip(self.ends, halves, (range(LENGTH), range(LENGTH - 1, -1, -1)), strict=True):
            h = c = torch.zeros(1, HIDDEN)
            steps = {}
            for t in order:
                own = h @ self.hidden[f"weight_hh{end}"].T + self.hidden[f"bias_hh{end}"]
                h, c = self._step(given[:, t], own, h, c)
                steps[t] = h
            outputs.append(torch.stack([steps[t] for t in range(LENGTH)], 1))
        return torch.cat(outputs, -1)

    def _step(self, given: Tensor, own: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_lstm:
            i, f, g, o = (given + own).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            return o.sigmoid() * c.tanh(), c
        (ri, zi, ni), (ro, zo, no) = given.chunk(3, -1), own.chunk(3, -1)
        r, z = (ri + ro).sigmoid(), (zi + zo).sigmoid()
        return (1 - z) * (ni + r * no).tanh() + z * h, c


def seeded(make: type[nn.Module], **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(**options).eval()


def tokens(count: int = BATCH, seed: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(0, WORDS, (count, length), generator=torch.Generator().manual_seed(seed))


@cache
def captured(bias: bool = True) -> Capture:
    return capture(seeded(Tagger, bias=bias), tokens())


def same(found: Any, expected: Any, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_moments_are_those_of_the_layer_written_out(kind: type[nn.LSTM] | type[nn.GRU]) -> None:
    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(WIDTH, HIDDEN, batch_first=True, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    model, x = seeded(Outputs), torch.randn(8, LENGTH, WIDTH)
    rnn = model.rnn
    assert isinstance(rnn, nn.LSTM | nn.GRU)
    written = Unrolled(rnn)
    same(written(x), model(x))
    found = tdfx.calibrate(capture(model, x[:2]), x, output="values").sites["rnn.ih_l0"]
    expected = tdfx.calibrate(capture(written, x[:2]), x, output="values").sites["gates"]
    assert found.out_cov is not None
    assert_site(found, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_the_declared_error_is_that_of_the_gates(bias: bool) -> None:
    network, data = captured(bias), tokens(64, seed=2)
    moments = tdfx.calibrate(network, data, metric="feature")
    profile = tdfx.profile(network, moments=moments, metric="feature:absolute", rank_multiple=1, target=None)
    sites, metas = profile.sites, ShapeProp((tokens(),)).run(network.module)
    scoring = scoring_of(network, sites, metas, profile.metric, moments, correct=True)
    inputs: dict[str, Tensor] = {}
    layers = {site.name: network.module.get_submodule(site.name) for site in sites}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, layer in layers.items()
    ]
    network.module(data)
    for handle in handles:
        handle.remove()
    recurrent = [site for site in sites if "ih_l" in site.name]
    assert [site.name for site in recurrent] == ["lstm.ih_l0", "lstm.ih_l1", "gru.ih_l0", "rnn.ih_l0"]
    for site in recurrent:
        (candidate,) = [c for c in profile.candidates if c.site == site.name and c.rank == (4,)]
        solved = solve(network.module, site, candidate, scoring, 0)
        with torch.no_grad():
            found, wanted = (
                layer(inputs[site.name]) for layer in (solved.replacements()[site.name].chain, layers[site.name])
            )
        measured = float((found - wanted).flatten(0, -2).double().square().sum(1).mean().sqrt())
        declared = solved.error(site_weight(network.module, site), scoring)
        assert measured == pytest.approx(declared, rel=1e-4), site.name


def plan_of(site: str, rank: int) -> tdfx.Plan:
    """A plan with one site, at one rank."""
    profile = tdfx.profile(captured(), include=[site], overrides={site: {"rank": rank}}, target=None)
    return tdfx.plan(profile, budget="params=99%")


@pytest.mark.parametrize("rank", [3, 8])
def test_costs_are_those_of_the_formula(rank: int) -> None:
    result = tdfx.apply(seeded(Tagger), tokens(), plan_of("lstm.ih_l1", rank))
    gates, into = 2 * 4 * HIDDEN, 2 * HIDDEN
    saved = gates * into - rank * (into + gates)
    assert result.before.params - result.after.params == saved
    assert result.before.macs - result.after.macs == BATCH * LENGTH * saved
    assert sum(map(Tensor.numel, result.module.parameters())) == result.after.params


@pytest.mark.parametrize(
    ("budget", "data", "bias"),
    [("params=60%", False, True), ("flops=60%", False, False), ("params=60%,flops=70%", True, True)],
)
def test_a_tagger_within_its_budget_saved_and_loaded(budget: str, data: bool, bias: bool, tmp_path: Path) -> None:
    model, calibration = seeded(Tagger, bias=bias), tokens(32, seed=3) if data else None
    result = tdfx.compress(model, tokens(), budget=budget, rank_multiple=1, target=None, calibration=calibration)
    for limit in budget.split(","):
        name, share = limit.rstrip("%").split("=")
        assert getattr(result.after, name) <= int(share) / 100 * getattr(result.before, name)
    assert any(candidate.site == "lstm.ih_l1" and not candidate.is_dense for candidate in result.plan.candidates)
    assert all(module.bias == bias for module in result.module.modules() if isinstance(module, nn.RNNBase))
    x = tokens(4, seed=5)
    tdfx.save(result, tmp_path / "saved")
    same(tdfx.load(tmp_path / "saved").module(x), result.module(x), rtol=0)
    assert result.original is not None
    same(result.original(x), model(x), rtol=0)


def compressed(**options: Any) -> tdfx.Result:
    return tdfx.compress(seeded(Tagger, **options), tokens(), budget="params=60%", rank_multiple=1, target=None)


@pytest.mark.parametrize("bias", [True, False])
def test_factors_that_were_trained_further_are_those_of_the_result(bias: bool) -> None:
    result, x = compressed(bias=bias), tokens(4, seed=5)
    with torch.no_grad():
        for parameter in result.module.parameters():
            parameter.mul_(1.1)
    state = result.module.state_dict()
    found = tdfx.apply(seeded(Tagger, bias=bias), tokens(), result.plan, factors=state)
    same(found.module(x), result.module(x), rtol=0)
    empty = tdfx.apply(seeded(Tagger, bias=bias), tokens(), result.plan, factors="empty").module
    assert bool(empty(x).isnan().any())
    empty.load_state_dict(state)
    same(empty(x), result.module(x), rtol=0)


def test_layers_that_stay_dense_are_as_they_were() -> None:
    model = seeded(Tagger)
    found = tdfx.apply(model, tokens(), plan_of("gru.ih_l0", 4)).module.state_dict()
    left = {name: value for name, value in model.state_dict().items() if not name.startswith("gru.")}
    same({name: value for name, value in found.items() if not name.startswith("gru.")}, left, rtol=0)


def test_a_result_trains_as_the_network_would() -> None:
    model = seeded(Tagger, dropout=0.5)
    network = capture(model, tokens(), trainable=True)
    profile = tdfx.profile(network, include=["gru.*"], target=None, rank_multiple=1)
    dense = tdfx.apply(model, tokens(), tdfx.plan(profile, budget="params=100%"))
    outputs = []
    for module in (model, dense.module, network.module):
        module.train()
        torch.manual_seed(3)
        outputs.append(module(tokens()))
    same(outputs[1], outputs[0], rtol=1e-6)
    same(outputs[2], outputs[0], rtol=1e-5)
    result = tdfx.compress(
        model, tokens(), budget="params=60%", rank_multiple=1, target=None, trainable=True
    ).module.train()
    result(tokens()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in result.parameters())
    assert any(isinstance(module, nn.Dropout) for module in result.modules())


@pytest.mark.filterwarnings("ignore:The tensor attributes .* assigned during export:UserWarning")
@pytest.mark.parametrize("as_program", [False, True])
def test_networks_that_take_torch_export(as_program: bool) -> None:
    model, x = seeded(Translator), tokens(length=2)
    given: Any = model
    if as_program:
        free, fixed = torch.export.Dim.DYNAMIC, torch.export.Dim.STATIC
        given = torch.export.export(model, (x,), strict=False, dynamic_shapes=((free, fixed),))
    result = tdfx.compress(given, x, budget="params=80%", rank_multiple=1, target=None)
    assert result.report.tier == "export"
    sites = [candidate.site for candidate in result.plan.candidates]
    assert sites == ["embed", "encoder.ih_l0", "encoder.ih_l1", "decoder.ih", "head"]
    assert not all(candidate.is_dense for candidate in result.plan.candidates)
    assert result.module(tokens(5, seed=7, length=2)).shape == (5, 2, WORDS)


def test_a_recurrent_layer_alone_is_a_network_and_an_operator_in_onnx(tmp_path: Path) -> None:
    rnn = seeded(nn.LSTM, input_size=WIDTH, hidden_size=HIDDEN, batch_first=True, bidirectional=True)
    x = torch.randn(BATCH, 2, WIDTH)
    result = tdfx.compress(rnn, x, budget="params=80%", rank_multiple=1, target=None)
    assert [candidate.site for candidate in result.plan.candidates] == ["layer.ih_l0"]
    assert sum(map(Tensor.numel, result.module.parameters())) == result.after.params <= 0.8 * result.before.params
    report = tdfx.export_onnx(result.module, tmp_path / "layer.onnx", x)
    assert report.max_rel_diff < 1e-4
    assert "LSTM" in [node.op_type for node in onnx.load(tmp_path / "layer.onnx").graph.node]


def test_a_subclass_that_computes_nothing_of_its_own_has_no_note() -> None:
    class Mine(nn.LSTM):
        pass

    network = capture(nn.Sequential(Mine(WIDTH, HIDDEN)), torch.randn(2, BATCH, WIDTH), trainable=True)
    assert network.notes == ()
