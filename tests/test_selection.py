from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tdfx.decompositions import registry
from tdfx.errors import OptionError
from tdfx.records.layer import LayerSpec, Site
from tdfx.selection import Selection, as_rank

NAMES = ("stem", "layer1.conv1", "layer1.conv2", "layer2.conv1", "fc")


def site(name: str) -> Site:
    return Site.of(LayerSpec(name, "linear", 8, 8))


def selection(**options: Any) -> Selection:
    return Selection.of(**{"methods": None, "include": None, "exclude": None, "overrides": None, **options})


def kept(chosen: Selection) -> list[str]:
    return [name for name in NAMES if chosen.reason_to_skip(site(name)) is None]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, list(NAMES)),
        ({"include": "layer*"}, ["layer1.conv1", "layer1.conv2", "layer2.conv1"]),
        ({"include": ["*.conv2", "fc"]}, ["layer1.conv2", "fc"]),
        ({"include": ("*.conv?",), "exclude": "layer1.*"}, ["layer2.conv1"]),
        ({"exclude": {"stem", "fc"}}, ["layer1.conv1", "layer1.conv2", "layer2.conv1"]),
        ({"exclude": []}, list(NAMES)),
        ({"exclude": "FC"}, list(NAMES)),
        ({"overrides": {"layer*": {"skip": True}}}, ["stem", "fc"]),
        (
            {"overrides": {"layer*": {"skip": True}, "*.conv1": {"skip": False}}},
            ["stem", "layer1.conv1", "layer2.conv1", "fc"],
        ),
    ],
)
def test_which_layers_are_compressed(options: dict[str, Any], names: list[str]) -> None:
    assert kept(selection(**options)) == names


def test_reasons_name_the_option_and_its_globs() -> None:
    chosen = selection(include=["layer*", "fc"], exclude="fc", overrides={"layer2.*": {"skip": True}})
    reasons = {name: skip.reason for name in NAMES if (skip := chosen.reason_to_skip(site(name))) is not None}
    assert reasons == {
        "stem": "not among include (layer*, fc)",
        "layer2.conv1": "skipped by overrides",
        "fc": "excluded (fc)",
    }


@pytest.mark.parametrize("option", ["include", "exclude", "overrides"])
def test_a_glob_that_matches_nothing_is_refused(option: str) -> None:
    globs = {"fc": {}, "layer3.*": {}} if option == "overrides" else ["fc", "layer3.*"]
    with pytest.raises(OptionError, match=rf"{option}: 'layer3.\*' matches no layer; the model has stem, .*fc$"):
        selection(**{option: globs}).check(NAMES)
    selection(**{option: "fc" if option != "overrides" else {"fc": {}}}).check(NAMES)


def test_the_message_lists_a_few_layers_only() -> None:
    with pytest.raises(OptionError, match=r"the model has l0, l1, l2, l3, l4, \.\.\.$"):
        selection(include="x").check([f"l{i}" for i in range(6)])


def test_methods_are_for_all_layers_but_for_overrides() -> None:
    chosen = selection(methods=["svd", "cp"], overrides={"layer1.*": {"methods": "tucker2"}, "*.conv2": {"rank": 3}})
    assert [method.name for method in chosen.methods_for(site("stem"))] == ["svd", "cp"]
    assert [method.name for method in chosen.methods_for(site("layer1.conv2"))] == ["tucker2"]
    assert selection().methods_for(site("stem")) == tuple(registry().values())


def test_later_globs_win_key_by_key() -> None:
    chosen = selection(overrides={"*": {"rank": 8, "methods": ["svd"]}, "layer1.*": {"rank": [4, 2]}})
    assert chosen.rank_for(site("stem")) == (8,)
    assert chosen.rank_for(site("layer1.conv1")) == (4, 2)
    assert [method.name for method in chosen.methods_for(site("layer1.conv1"))] == ["svd"]
    assert selection().rank_for(site("stem")) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["svdd"]}, r"unknown method 'svdd'; did you mean 'svd'\?"),
        ({"methods": []}, "methods is empty"),
        ({"include": []}, "include is empty; name at least one glob, or leave it out"),
        ({"include": 5}, "include is 5; expected a glob"),
        ({"exclude": ["fc", 3]}, r"exclude is \['fc', 3\]; expected a glob"),
        ({"overrides": ["fc"]}, "overrides is a list; expected a dictionary"),
        ({"overrides": {0: {}}}, "overrides has the key 0; expected a glob"),
        ({"overrides": {"fc": 8}}, r"overrides\['fc'\] is a int; expected a dictionary"),
        ({"overrides": {"fc": {"ranks": 8}}}, r"overrides\['fc'\] has 'ranks'; understood are methods, rank, skip"),
        ({"overrides": {"fc": {"rank": 0}}}, r"overrides\['fc'\]\['rank'\] is 0; expected a positive integer"),
        ({"overrides": {"fc": {"methods": ["svdd"]}}}, "unknown method 'svdd'"),
        ({"overrides": {"fc": {"methods": []}}}, "methods is empty"),
        ({"overrides": {"fc": {"skip": "no"}}}, r"overrides\['fc'\]\['skip'\] is 'no'; expected True or False"),
    ],
)
def test_what_is_not_understood_is_named(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        selection(**options)


def test_ranks() -> None:
    assert [as_rank(value, "rank") for value in (3, [3], (3, 4))] == [(3,), (3,), (3, 4)]


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "8", None, [], [4, 0], [4, 2.5], [[4]]])
def test_what_is_no_rank_is_refused(value: object) -> None:
    with pytest.raises(OptionError, match=r"^the rank is .*; expected a positive integer"):
        as_rank(value, "the rank")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "methods names channel_svd, cp, .*tucker2; expected exactly one"),
        ({"methods": ["svd", "tt"]}, "methods names svd, tt;"),
        (
            {"methods": "svd", "overrides": {"fc": {"methods": ["cp", "tt"]}}},
            r"overrides\['fc'\]\['methods'\] names cp, tt;",
        ),
    ],
)
def test_more_than_one_method_is_no_single_one(options: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        selection(**options).check_one_method()


def test_overrides_may_name_another_single_method() -> None:
    selection(methods=["tucker2"], overrides={"fc": {"methods": "svd"}, "stem": {"skip": True}}).check_one_method()
