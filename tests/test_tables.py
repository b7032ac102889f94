from __future__ import annotations

import pytest

from tdfx.tables import align, count, seconds, share


def test_columns_are_as_wide_as_their_widest_entry() -> None:
    text = align(("layer", "n"), [("a", "1"), ("longer", "200")], right=(1,))
    assert text.split("\n") == ["layer     n", "------  ---", "a         1", "longer  200"]


def test_a_table_without_rows_is_its_header() -> None:
    assert align(("a", "bc"), []) == "a  bc\n-  --"


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        align(("a", "b"), [("1", "2", "3")])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (12, "12"), (999, "999"), (1000, "1K"), (3456, "3.46K"), (999_499, "999K"), (999_500, "1M"),
        (999_999, "1M"), (41_200_000, "41.2M"), (999_999_999, "1G"), (2_500_000_000_000, "2500G"), (-3456, "-3.46K"),
    ],
)  # fmt: skip
def test_counts_have_three_digits_and_a_unit(value: float, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0 ms"), (1.2345e-5, "0.0123 ms"), (0.25, "250 ms"), (0.9999, "1 s"), (1.5, "1.5 s")],
)
def test_seconds(value: float | None, text: str) -> None:
    assert seconds(value) == text


def test_share_of_nothing_is_a_dash() -> None:
    assert share(1, 4) == "25.0%"
    assert share(1, 0) == "-"
