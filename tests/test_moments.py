from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tdfx.errors import InputError, PlanError
from tdfx.moments import Moments, SiteMoments
from tdfx.records.layer import Skipped


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments() -> Moments:
    return Moments(
        sites={
            "block.0.conv": SiteMoments(draw(3), draw(3, 3), draw(2, 2)),
            "head": SiteMoments(draw(2, seed=1), draw(2, 2, seed=1)),
        },
        skipped=(Skipped("wide", "its covariance is too large"),),
        samples=5,
        output="logits",
        inputs=tuple(draw(5, index + 1) for index in range(11)),
        structure="s" * 32,
        weights="w" * 32,
        trainable=True,
    )


def assert_same(found: Moments, expected: Moments) -> None:
    assert found.fingerprint == expected.fingerprint
    assert list(found.sites) == list(expected.sites) or set(found.sites) == set(expected.sites)
    for name, site in expected.sites.items():
        assert torch.equal(found.sites[name].mean, site.mean)
        assert torch.equal(found.sites[name].in_cov, site.in_cov)
        kept = found.sites[name].out_cov
        assert (kept is None) == (site.out_cov is None)
        assert kept is None or site.out_cov is None or torch.equal(kept, site.out_cov)
    assert len(found.inputs) == len(expected.inputs)
    assert all(torch.equal(a, b) for a, b in zip(found.inputs, expected.inputs, strict=True))
    for field in ("skipped", "samples", "output", "structure", "weights", "trainable"):
        assert getattr(found, field) == getattr(expected, field)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    moments().save(path)
    assert_same(Moments.load(path), moments())
    empty = replace(moments(), sites={}, skipped=(), inputs=(), output=None)
    empty.save(path)
    assert_same(Moments.load(path), empty)


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    whole = draw(6, 6)
    given = replace(moments(), sites={"a": SiteMoments(whole[0], whole.T[:, :6]), "b": SiteMoments(whole[1], whole)})
    given.save(tmp_path / "m")
    assert_same(Moments.load(tmp_path / "m"), given)


def test_the_fingerprint_is_of_every_tensor() -> None:
    given = moments()
    head = given.sites["head"]
    changes = [
        replace(given, sites={**given.sites, "head": replace(head, mean=head.mean + 1)}),
        replace(given, sites={**given.sites, "head": replace(head, in_cov=head.in_cov + 1)}),
        replace(given, sites={**given.sites, "head": replace(head, out_cov=torch.eye(2))}),
        replace(given, sites={"head": head}),
        replace(given, sites={"tail" if name == "head" else name: site for name, site in given.sites.items()}),
        replace(given, inputs=given.inputs[:10]),
    ]
    assert len({entry.fingerprint for entry in (given, *changes)}) == 1 + len(changes)
    assert replace(given, sites=dict(reversed(given.sites.items()))).fingerprint == given.fingerprint


def test_files_that_hold_none(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(InputError, match=r"cannot read moments from .*m\.safetensors"):
        Moments.load(path)
    path.write_bytes(b"text")
    with pytest.raises(InputError, match="cannot read moments"):
        Moments.load(path)
    safetensors.torch.save_file({"weight": draw(2)}, path)
    with pytest.raises(PlanError, match="holds no moments of version 2; make them anew"):
        Moments.load(path)
    safetensors.torch.save_file({"weight": draw(2)}, path, {"tdfx_moments": '{"version": 1}'})
    with pytest.raises(PlanError, match="holds no moments of version 2"):
        Moments.load(path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"version": 2}', '{"version": 2, "skipped": [], "observations": {}, "x": 1}']
)
def test_files_that_hold_a_part(tmp_path: Path, text: str) -> None:
    safetensors.torch.save_file({"mean:head": draw(2)}, tmp_path / "m", {"tdfx_moments": text})
    with pytest.raises(PlanError, match=r"is no whole file of moments .* make them anew"):
        Moments.load(tmp_path / "m")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        moments().save(tmp_path / "file" / "m")


def test_scarcity_names_the_site_with_the_fewest_observations() -> None:
    assert moments().scarcity() is None  # not known
    site = moments().sites["block.0.conv"]  # of three values
    assert replace(moments(), sites={"a": replace(site, observations=3)}).scarcity() is None
    scarce = {name: replace(site, observations=n) for name, n in (("a", 2), ("b", 1), ("c", 9))}
    found = replace(moments(), sites=scarce).scarcity()
    assert found is not None
    assert found.startswith("calibration saw little of 2 layers, least of b: 1 independent inputs of 3 values")


def test_observations_are_kept(tmp_path: Path) -> None:
    given = moments()
    sites = {**given.sites, "head": replace(given.sites["head"], observations=7)}
    replace(given, sites=sites).save(tmp_path / "m")
    found = Moments.load(tmp_path / "m").sites
    assert (found["head"].observations, found["block.0.conv"].observations) == (7, None)
