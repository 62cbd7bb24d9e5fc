"""While the tests run, a call of the package whose arguments or result are not what its annotations say raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, Int, TypeCheckError
from torch import Tensor

from kvcompress.kernels import dense
from tests.type_checker import check, jaxtyped, off

if TYPE_CHECKING:
    from pathlib import Path

Rows = tuple[Float[Tensor, "rows 2"], Float[Tensor, "rows 3"]]


@check
def scaled(values: Float[Tensor, "rows columns"], by: float, at: Path | None = None) -> Float[Tensor, "rows columns"]:
    """`at` names what only a static checker knows."""
    return values[: int(by)] if by > 1 else values * by


@check
def pair(first: int, second: int) -> Rows:
    inner(torch.zeros(first + second, 2))  # its sizes are its own
    return torch.zeros(first, 2), torch.zeros(second, 3)


@check
def inner(values: Float[Tensor, "rows 2"]) -> None:
    """Has an axis of the same name."""


@check
def counted(values: Int[Tensor, " rows"]) -> Iterator[int]:
    yield from values.tolist()


@check
def named(later: Later) -> str:
    return later.name


@jaxtyped
@dataclass
class Later:
    name: str


def test_what_fits_goes_through() -> None:
    assert scaled(torch.ones(2, 3), 1, at=None).shape == (2, 3)
    assert [len(part) for part in pair(4, 4)] == [4, 4]
    assert list(counted(torch.arange(3))) == [0, 1, 2]
    assert named(Later("a")) == "a"


@pytest.mark.parametrize(
    "call",
    [
        lambda: scaled(torch.ones(2), 1),
        lambda: scaled(torch.ones(2, 3, dtype=torch.int64), 1),
        lambda: scaled(torch.ones(2, 3), "1"),
        lambda: scaled(torch.ones(4, 3), 2),
        lambda: pair(4, 5),
        lambda: list(counted(torch.ones(3))),
        lambda: named("a"),
        lambda: Later(1),
        lambda: dense.attention(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), 1.0),
    ],
    ids=["axes", "dtype", "type", "result", "alias", "generator", "defined later", "dataclass", "package"],
)
def test_what_does_not_fit_raises(call: Callable[[], object]) -> None:
    with pytest.raises((BeartypeCallHintViolation, TypeCheckError)):
        call()


def test_nothing_is_checked_while_it_is_off() -> None:
    with off():
        assert scaled(torch.ones(4, 3), 2).shape == (2, 3)
        assert Later(1).name == 1  # type: ignore[arg-type, comparison-overlap]
    with pytest.raises((BeartypeCallHintViolation, TypeCheckError)):
        Later(1)  # type: ignore[arg-type]
