"""Laws of policies: a sentence, what Hypothesis draws for it, and a check that can fail."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisWarning
from torch import Tensor

from kvcompress.errors import BudgetWarning, LawError
from kvcompress.policies.base import Policy

Draws = Callable[[Any], st.SearchStrategy[Any]]
_NUMBERS = 64  # of a tensor that are shown
_LAWS: list[Law] = []


@dataclass(frozen=True)
class Law:
    """What every policy of a stage promises.

    Attributes:
        stages: the stages whose policies it binds.
        name: of the function that checks it.
        sentence: what it says.
        holds: raises where a policy breaks it, for one example.
        draws: for a policy, the examples.
        binds: whether it is about a policy at all.
        runs_models: whether an example runs whole models.
        share: of the examples that are asked for, how many are drawn: fewer where models run, or where almost any
            example of a policy that breaks the law would do.
    """

    stages: tuple[str, ...]
    name: str
    sentence: str
    holds: Callable[[Any, Any], None]
    draws: Draws
    binds: Callable[[Any], bool]
    runs_models: bool = False
    share: float = 1.0

    def __str__(self) -> str:
        return self.name

    def check(self, policy: Policy, *, max_examples: int | None = None, shrink: bool = True) -> None:
        """Searches for an example that breaks the law.

        Args:
            policy: the policy.
            max_examples: how many examples are asked for; those of Hypothesis's profile if None.
            shrink: whether to look for the smallest example that breaks it; if not, it is the first one found.

        Raises:
            LawError: with the sentence, the smallest example found, and what the policy did.
        """
        number = profile_examples() if max_examples is None else max_examples
        failed: list[Any] = []

        @settings(
            max_examples=max(1, round(number * self.share)),
            deadline=None,
            database=None,
            derandomize=True,
            report_multiple_bugs=False,
            print_blob=False,
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(example=self.draws(policy))
        def search(example: Any) -> None:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", BudgetWarning)  # drawn prompts are short
                    self.holds(policy, example)
            except Exception:
                failed[:] = [example]  # the last one is the smallest
                raise

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", HypothesisWarning)  # that an example is long: `shown_example` cuts it
                search()
        except Exception as error:
            if not failed:  # the strategy itself, or Hypothesis
                raise
            raise LawError(
                f"{policy.stage} {name_of(policy)}: breaks the law {self.name!r}.\n  {self.sentence}\n"
                f"It did: {_told(error)}\nThe smallest example: {shown_example(failed[0])}"
            ) from error


def law(
    *stages: str,
    draws: Draws,
    binds: Callable[[Any], bool] = lambda policy: True,
    runs_models: bool = False,
    share: float = 1.0,
) -> Callable[[Callable[[Any, Any], None]], Law]:
    """Decorator of a function that raises where a policy breaks a law, whose sentence is its docstring; see `Law`."""

    def decorate(holds: Callable[[Any, Any], None]) -> Law:
        sentence = " ".join((holds.__doc__ or "").split())
        made = Law(stages, holds.__name__, sentence, holds, draws, binds, runs_models, share)
        _LAWS.append(made)
        return made

    return decorate


def all_laws() -> tuple[Law, ...]:
    """Every law of every stage, those that run no model first."""
    from kvcompress.testing import (  # noqa: F401  (each adds its own)
        allocator_laws,
        evictor_laws,
        merger_laws,
        model_laws,
        quantizer_laws,
        reducer_laws,
        scorer_laws,
    )

    return tuple(sorted(_LAWS, key=lambda one: one.runs_models))


def laws_of(policy: Policy) -> tuple[Law, ...]:
    """The laws that bind a policy, in the order in which they are checked."""
    return tuple(one for one in all_laws() if policy.stage in one.stages and one.binds(policy))


def require(holds: bool | Tensor, says: str | Callable[[], str]) -> None:
    """Raises what a policy did wrong, if it did.

    Args:
        holds: whether all is well; a tensor if everything in it is.
        says: what is wrong, or what tells it.

    Raises:
        AssertionError: with these words.
    """
    if isinstance(holds, Tensor):
        holds = bool(holds.all())
    if not holds:
        raise AssertionError(says if isinstance(says, str) else says())


def require_close(found: Tensor, wanted: Tensor, tolerance: float, says: str, relative: float = 0.0) -> None:
    """Raises if two tensors differ by more than a tolerance in any number."""
    try:
        torch.testing.assert_close(
            found.double(), wanted.double(), rtol=relative, atol=tolerance, equal_nan=True, check_device=True
        )
    except AssertionError as error:
        raise AssertionError(f"{says}: {' '.join(str(error).split())}") from None


def tensors_of(given: Any) -> dict[str, Tensor]:
    """Copies of the tensors in an object's fields, also of those in its mappings."""
    found: dict[str, Tensor] = {}
    for name, value in vars(given).items():
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        found |= {f"{name} {key}".strip(): part.clone() for key, part in parts if isinstance(part, Tensor)}
    return found


def require_unchanged(before: dict[str, Tensor], given: Any) -> None:
    """Raises if a tensor of an object is not what its copy is."""
    now = tensors_of(given)
    for name, tensor in before.items():
        same = now[name].shape == tensor.shape and torch.equal(
            now[name].nan_to_num(nan=-77.0), tensor.nan_to_num(nan=-77.0)
        )
        require(same, f"it wrote to {name!r} of what it was given")


def profile_examples() -> int:
    """Examples that Hypothesis's profile draws."""
    profile = settings.default
    assert profile is not None
    return profile.max_examples


def name_of(policy: Policy) -> str:
    """Its registered name, or its class's."""
    return policy.name or type(policy).__name__


def shown_example(example: Any) -> str:
    """An example as the failure of a law shows it: fields with their numbers, or their shapes where there are many."""
    if isinstance(example, Tensor):
        if example.numel() > _NUMBERS:
            return f"<{str(example.dtype).removeprefix('torch.')} {list(example.shape)}>"
        return str(example.tolist())
    if dataclasses.is_dataclass(example) and not isinstance(example, type):
        fields = ((one.name, getattr(example, one.name)) for one in dataclasses.fields(example))
        return f"{type(example).__name__}({', '.join(f'{name}={shown_example(value)}' for name, value in fields)})"
    if isinstance(example, (list, tuple)):
        return f"[{', '.join(map(shown_example, example))}]"
    if isinstance(example, Mapping):
        return f"{{{', '.join(f'{key}: {shown_example(value)}' for key, value in example.items())}}}"
    return repr(example)


def _told(error: Exception) -> str:
    told = str(error)
    return told if isinstance(error, AssertionError) and told else f"{type(error).__name__}: {told}"
