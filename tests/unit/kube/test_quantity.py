"""CPU quantities, as Kubernetes writes and accepts them."""

import pytest

from vcpuset.kube.quantity import millicores


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1000),
        (2, 2000),
        ("500m", 500),
        ("0.5", 500),
        (".5", 500),
        ("2.", 2000),
        ("100u", 1),
        ("1n", 1),
        ("1001u", 2),
        ("1k", 1_000_000),
        ("1e1", 10_000),
        ("0", 0),
    ],
)
def test_a_quantity_is_read_in_millicores_rounded_up(text: str | int, expected: int) -> None:
    assert millicores(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "1Gi", "1 m", "m", "one", "1e", None, 1.5, "9" * 40])
def test_anything_else_is_none(text: object) -> None:
    assert millicores(text) is None
