"""The runtime type checker that jaxtyping's import hook puts on every function of the package."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for static type checkers
