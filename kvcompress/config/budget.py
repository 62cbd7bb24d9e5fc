"""How much a cache may hold."""

from __future__ import annotations

import re
import warnings
from numbers import Integral, Real
from typing import Any, ClassVar

from pydantic import ByteSize, Field, field_serializer, field_validator, model_validator

from kvcompress.errors import BudgetError, BudgetWarning, shown
from kvcompress.policies.configured import Configured

_BYTES = re.compile(r"\s*\d+(\.\d+)?\s*([kmgtp]i?)?b\s*", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(\d{1,3}(\.\d{1,20})?)\s*%\s*")
_MOST_BYTES = 2**63 - 1


class Budget(Configured):
    """What the cache may hold: exactly one of `fraction`, `tokens` and `bytes`.

    Args:
        fraction: share of the tokens seen, over all layers together, in (0, 1]; the budget grows with the sequence.
        tokens: tokens per layer on average, at least 1.
        bytes: bytes of the whole cache's keys and values, over all processes where several share the heads, split
            equally over the rows of a batch; a number or text such as "64MiB". Rows share rectangular buffers, so where
            an allocator gives the rows of a batch different layer sizes, the padding of the shorter ones comes on top;
            the report counts it.
        sink: first tokens of a row that every layer keeps.
        recent: last tokens of a row that every layer keeps.
        whole: tokens up to which a row is kept whole, whatever the fraction gives; goes with a fraction alone.

    Raises:
        BudgetError: if none or several are given, or one is out of range.
    """

    unbounded: ClassVar[frozenset[str]] = frozenset({"fraction", "bytes"})

    fraction: float | None = None
    tokens: int | None = None
    bytes: ByteSize | None = None
    sink: int = Field(default=1, ge=0)
    recent: int = Field(default=1, ge=0)
    whole: int = Field(default=0, ge=0)

    @field_validator("bytes", mode="before")
    @classmethod
    def _with_unit(cls, value: object) -> object:
        if isinstance(value, str) and (len(value) > 40 or not _BYTES.fullmatch(value)):
            raise BudgetError(
                f"budget: text must be bytes with a unit, such as '64MiB', or a share, such as '20%'; got "
                f"{shown(value)}. A fraction is a float (0.2), tokens per layer are an int (512)"
            )
        return value

    @model_validator(mode="after")
    def _one_amount(self) -> Budget:
        given = {key: getattr(self, key) for key in ("fraction", "tokens", "bytes") if getattr(self, key) is not None}
        if len(given) != 1:
            came = ", ".join(f"{key}={value}" for key, value in given.items()) or "none"
            raise BudgetError(f"budget: give exactly one of fraction, tokens and bytes; got {came}")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise BudgetError(
                f"budget: a fraction lies in (0, 1]; got {self.fraction}. For a number of tokens per layer pass an int"
            )
        if self.tokens is not None and self.tokens < 1:
            raise BudgetError(f"budget: tokens per layer must be at least 1; got {self.tokens}")
        if self.bytes is not None and not 1 <= self.bytes <= _MOST_BYTES:
            raise BudgetError(f"budget: bytes must be from 1 to 2^63 - 1; got {shown(int(self.bytes))}")
        if self.whole and self.fraction is None:
            raise BudgetError(
                f"budget: whole goes with a fraction, since tokens and bytes are amounts that no row goes beyond; got "
                f"whole={self.whole} with {next(iter(given))}; leave one out"
            )
        return self

    @field_serializer("bytes")
    def _plain_bytes(self, value: ByteSize | None) -> int | None:
        return None if value is None else int(value)

    @property
    def keeps_everything(self) -> bool:
        """Whether nothing ever has to go."""
        return self.fraction == 1.0

    @property
    def given(self) -> dict[str, Any]:
        """The fields that were given, as plain values."""
        return self.model_dump(mode="json", exclude_unset=True, exclude_none=True)

    @classmethod
    def parse(cls, given: object, default: Budget | None = None) -> Budget:
        """Reads a budget given as an object, a dict or bare: a float or "20%" is a fraction, an int tokens, text bytes.

        A bare 1 warns, since it is one token, where many mean 1.0.

        Args:
            given: what the user wrote.
            default: where a bare amount takes `sink` and `recent` from.

        Raises:
            BudgetError: if it can be read as none of these.
        """
        protected: dict[str, Any] = {"sink": default.sink, "recent": default.recent} if default else {}
        if isinstance(given, cls):
            return given
        if isinstance(given, dict):
            if not all(isinstance(key, str) for key in given):
                raise BudgetError(f"budget: names of fields are texts; got {shown(list(given))}")
            return cls(**given)
        if isinstance(given, bool):
            raise BudgetError(f"budget: must be a number, text or a Budget; got {given}")
        if isinstance(given, Integral):
            if given == 1:
                warnings.warn(
                    "budget: 1 means one token per layer, and with the protected ones hardly any; everything is 1.0 or "
                    "'100%', and Budget(tokens=1) says that one token is meant",
                    BudgetWarning,
                    stacklevel=2,
                )
            return cls(tokens=int(given), **protected)
        if isinstance(given, Real):
            return cls(fraction=float(given), **protected)
        if isinstance(given, str):
            share = _PERCENT.fullmatch(given)
            if share is not None:
                return cls(fraction=float(share[1]) / 100, **protected)
            return cls(**{"bytes": given, **protected})
        raise BudgetError(
            f"budget: must be a float (fraction), an int (tokens per layer), text ('64MiB', '20%') or a "
            f"Budget; got "
            f"{shown(given)}"
        )
