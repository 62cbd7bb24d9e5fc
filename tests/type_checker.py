"""The runtime type checker that jaxtyping's import hook puts on every function of the package.

`jaxtyping.jaxtyped` binds the arguments of each call to the signature and checks them twice, for messages that name the
sizes of axes; half of the suite's time went there. Here beartype checks a call once, only a function whose
annotations have shapes remembers the sizes of axes, and a checker is made when its function is first called.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

_typed = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for static type checkers
_slow = jaxtyping.jaxtyped
_scope = _slow("context")  # in which axes of one name have one size
_off = False


@contextmanager
def off() -> Iterator[None]:
    """Nothing is checked within, so that what comes of a wrong type is what it is outside of the tests."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def jaxtyped(given: Any = None, *, typechecker: Any = None) -> Any:
    """Takes the place of `jaxtyping.jaxtyped`, which the hook calls for each function and class of the package."""
    if given is None:
        return jaxtyped
    if _is_strategy(given):
        return given
    if not inspect.isclass(given):
        return check(given)
    if "__dataclass_fields__" in vars(given) and "__init__" in vars(given):
        given.__init__ = check(given.__init__)
    return given


def check(function: FunctionType) -> Callable[..., Any]:
    """The function, which raises where an argument or the result is not what the annotations say."""
    if _is_strategy(function):
        return function
    if inspect.isgeneratorfunction(function):  # its body runs when the scope is closed
        return _slow(function, typechecker=_typed)
    typed: Callable[..., Any] | None = None
    has_shapes = True

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal typed, has_shapes
        if _off:
            return function(*args, **kwargs)
        if typed is None:  # by now the names that annotations use are defined
            readable = _with_types(function)
            has_shapes = any("jaxtyping." in str(hint) for hint in readable.__annotations__.values())
            typed = _typed(readable)
        if not has_shapes:
            return typed(*args, **kwargs)
        with _scope:
            return typed(*args, **kwargs)

    return checked


def _with_types(function: FunctionType) -> FunctionType:
    """A copy whose annotations are types, without those that only a static checker can read."""
    copied = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__, copied.__qualname__ = function.__kwdefaults__, function.__qualname__
    copied.__module__ = function.__module__
    for name, hint in function.__annotations__.items():
        try:
            copied.__annotations__[name] = eval(hint, function.__globals__) if isinstance(hint, str) else hint
        except NameError:
            continue
    return copied


def _is_strategy(given: Any) -> bool:
    """Whether it draws examples, in which beartype's own draws would be taken for the strategy's."""
    return bool(given.__module__.startswith("kvcompress.testing"))
