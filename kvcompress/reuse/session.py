"""Compression for code that calls `generate` by itself: every call inside a `with` block gets a new cache."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from os import PathLike
from typing import Any

from transformers import PreTrainedModel

from kvcompress.cache import CompressedCache, hooks
from kvcompress.cache.argument import cache_among, cache_argument
from kvcompress.cache.report import CacheReport
from kvcompress.config import CompressionConfig
from kvcompress.errors import UnsupportedModeError

_inner: ContextVar[tuple[Session, ...]] = ContextVar("kvcompress_sessions", default=())
_open: list[Session] = []  # of all threads, in the order in which they were opened
_changing = threading.RLock()


class Session:
    """What happens inside a `compressing` block.

    Attributes:
        config: how caches compress.
        reports: what each cache held when its `generate` was done, in the order in which they ended. They tell of
            every token that was kept; clear the list where a session goes on for long.
    """

    def __init__(self, model: PreTrainedModel, config: CompressionConfig, options: dict[str, Any]) -> None:
        self.config, self.reports, self.is_open = config, list[CacheReport](), True
        self._model, self._options = weakref.ref(model), options

    def __repr__(self) -> str:
        return f"Session({self.config!r}, {len(self.reports)} reports)"

    def serves(self, model: object) -> bool:
        """Whether it is open, and for this model."""
        return self.is_open and self._model() is model

    def generate(self, model: PreTrainedModel, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls `generate` with a new cache, unless it was given one.

        Raises:
            UnsupportedModeError: for `use_cache=False`, and for a `cache_implementation`.
        """
        if cache_among(kwargs) is not None:
            return call(*args, **kwargs)
        if kwargs.get("use_cache") is False:
            raise UnsupportedModeError(
                "use_cache=False: generates without a cache, so there is nothing to compress; leave it out, or call "
                "generate outside of the 'with kvcompress.compressing(...)' block"
            )
        configs = (*args[1:2], kwargs.get("generation_config"), model.generation_config)
        asked = (getattr(config, "cache_implementation", None) for config in configs)
        wanted = kwargs.get("cache_implementation", next(filter(None, asked), None))
        if wanted not in (None, "hybrid"):  # which transformers takes for none: the first Gemma models were saved so
            raise UnsupportedModeError(
                f"cache_implementation={wanted!r}: asks generate for a cache of transformers, and inside of a 'with "
                "kvcompress.compressing(...)' block it has a compressed one; leave it out (None where the model's "
                "generation_config says it), or call generate outside of the block"
            )
        cache = CompressedCache(model, self.config, **self._options)
        output = call(*args, **kwargs, **cache_argument(cache))
        self.reports.append(cache.report())
        return output


@contextmanager
def compressing(
    model: PreTrainedModel,
    config: str | PathLike[str] | dict[str, Any] | CompressionConfig = "auto",
    *,
    reserve: int = 0,
    decoding: str = "captured",
    **overrides: Any,
) -> Iterator[Session]:
    """Gives every `generate` of a model inside the block a new compressed cache, whoever calls it.

    Pipelines, evaluation harnesses and streamers need no change. A call that brings a cache of its own keeps it. Blocks
    may be nested, and several threads may each have one for the same model: a call follows the innermost block around
    it; in a thread that has none (a streamer's), the one that was opened last. Whatever happens inside, `generate` is
    afterwards what it was.

    Args:
        model: the model.
        config: as for a `CompressedCache`.
        reserve: as for a `CompressedCache`.
        decoding: as for a `CompressedCache`.
        **overrides: fields of the configuration to replace, for instance `budget=0.2`.

    Yields:
        The session, with a report for every call.

    Raises:
        ConfigError: if the configuration is wrong; nothing is touched then.
        UnsupportedModelError: if the model cannot be served.

    Example:
        >>> with compressing(model, "prefixkv", budget=0.5) as session:
        ...     output = model.generate(**inputs, max_new_tokens=4)
        >>> session.reports[0].retention <= 0.5
        True
    """
    options: dict[str, Any] = {"reserve": reserve, "decoding": decoding}
    first = CompressedCache(model, config, **options, **overrides)  # refuses what cannot be; puts hooks on
    session = Session(model, first.config, options)
    with _changing:
        if not isinstance(model.__dict__.get("generate"), _Compressing):
            model.__dict__["generate"] = _Compressing(model)
        _open.append(session)
    _inner.set((*_inner.get(), session))
    try:
        yield session
    finally:  # maybe in another thread or task than it was opened in
        _inner.set(tuple(other for other in _inner.get() if other is not session))
        with _changing:
            session.is_open = False
            _open.remove(session)
            own = model.__dict__.get("generate")
            if isinstance(own, _Compressing) and not any(other.serves(model) for other in _open):
                own.take_off(model)


class _Compressing:
    """A model's `generate` while a session is open; holds the model by weak reference."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.former = weakref.ref(model), model.__dict__.get("generate")
        functools.update_wrapper(self, type(model).generate)  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model()
        assert model is not None
        call = self.former or functools.partial(type(model).generate, model)  # type: ignore[attr-defined]
        for sessions in (_inner.get(), tuple(_open)):
            for session in reversed(sessions):
                if session.serves(model):
                    return session.generate(model, call, *args, **kwargs)
        return call(*args, **kwargs)

    def take_off(self, model: PreTrainedModel) -> None:
        """Puts back what was there, unless `restore` took everything off in between."""
        del model.__dict__["generate"]
        if self.former is not None and (hooks.is_hooked(model) or not isinstance(self.former, hooks.Generate)):
            model.__dict__["generate"] = self.former

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model is in no session."""
        return hooks.Generate, (self.model(),)
