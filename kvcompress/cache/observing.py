"""What a compressed cache is told of a call before and after it runs, and what it makes of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.cache import choosing, hooks, periods, tables, undoing, watching
from kvcompress.cache.axes import check_positions, give_offset, take_offset
from kvcompress.cache.capture import plan
from kvcompress.cache.inputs import check_types, shape_of
from kvcompress.cache.masks import Mask, read_mask
from kvcompress.cache.owner import OfModel
from kvcompress.cache.state import CacheState
from kvcompress.cache.window import check_forward, check_turn
from kvcompress.errors import CacheStateError, ConfigError, UnsupportedModeError
from kvcompress.integrations import Adapter
from kvcompress.policies.context import TowerView
from kvcompress.policies.images import ImageLayout


class Observes(OfModel, hooks.ObservesInputs):
    """What the hooks on a model and its decoder call, and `generate`."""

    def __init__(self, state: CacheState, adapter: Adapter, model: PreTrainedModel, decoding: str) -> None:
        """Between two forwards.

        Raises:
            ConfigError: if there is no such way of decoding.
        """
        super().__init__(state, adapter, model)
        if decoding not in ("captured", "compiled", "eager"):
            raise ConfigError(f"decoding: must be 'captured', 'compiled' or 'eager'; got {decoding!r}")
        self._decoding, self.window, state.typed = decoding, adapter.window(model), adapter.typed
        self._in_turn = False  # of `generate`
        self._recorded = False  # whether the past was recorded before that
        self._mask: Mask | None = None  # what the mask of the forward about to begin says, if anything
        self._layout: ImageLayout | None = None  # of the images of that forward
        self._watch: watching.Watch | None = None  # of the vision tower that makes their features
        self._images_to_come: Tensor | None = None

    # -- before a forward ----------------------------------------------------------------------------------------------

    def before_turn(self, model: PreTrainedModel, inputs: dict[str, Any]) -> None:
        """Looks at what `generate` was given, before it cuts off what was seen.

        Args:
            model: the model that generates.
            inputs: what `generate` was given.

        Raises:
            CacheStateError: if the ids do not begin with what the cache has seen, the mask does not cover it, or the
                cache was made for another model.
            UnsupportedModeError: for a row of padding alone, or a model that trains or attends otherwise by now.
        """
        if all(part is not self.decoder() for part in model.modules()):
            raise _of_another(model)
        self.check_decoder()
        tables.catch_up_if_needed(self._state)
        check_turn(self.window, self._adapter, model, inputs)
        self._state.calls.turn(inputs, self._state.sequence.seen)
        give_offset(self._state.sequence, self._adapter, self._model())
        self._in_turn, self._recorded = True, self._state.recording
        self._begin_watching(inputs)
        choosing.for_turn(self._state, model, self._adapter, inputs)

    def before_forward(
        self, inputs: dict[str, Any], is_image: Tensor | None, layout: Callable[[], ImageLayout | None]
    ) -> None:
        """Looks at the inputs of a forward before it runs; called by the hook on the model.

        Raises:
            UnsupportedModeError: for labels, masks that are not two-dimensional, right padding in `generate`, and an
                image to be reduced while the past is recorded.
            UnsupportedModelError: if the places of image tokens in their images cannot be known, which a reducer needs.
            CacheStateError: for an attention mask that does not cover what was seen.
        """
        if torch.compiler.is_compiling():  # a decode step
            return
        tables.catch_up_if_needed(self._state)
        check_forward(self.window, self._adapter, self.model(), inputs, self._state.sequence.seen)
        if self._adapter.typed and self._adapter.reads_types(inputs):
            check_types(inputs, self._state.sequence.seen)
        self._state.calls.model(inputs, self._state.sequence.seen, self._state.recording)
        self._forget_images()
        if inputs.get("pixel_values") is not None:  # or else `generate` has made the features
            self._begin_watching(inputs)
        if not self._in_turn:  # `generate` has seen to it
            check_positions(self._state.sequence, self._adapter, inputs)
            give_offset(self._state.sequence, self._adapter, self._model())
        if is_image is not None:
            self._expect_images(is_image, layout)

    def before_decoder(self, decoder: nn.Module, inputs: dict[str, Any]) -> None:
        """Looks at the decoder that is about to run and at its inputs; called by the hook on it.

        Raises:
            CacheStateError: if the cache was made for another model.
            UnsupportedModeError: in training mode, and if the decoder was called by itself where a policy has to know
                what is an image.
        """
        if torch.compiler.is_compiling():
            return
        watching.end()
        if self.decoder() is not decoder:
            raise _of_another(decoder)
        if decoder.training:  # with gradient checkpointing, layers are given no cache that could refuse
            self.check_decoder()
        tables.catch_up_if_needed(self._state)
        check_forward(self.window, self._adapter, self.model(), inputs, self._state.sequence.seen)
        if self._state.calls.decoder(inputs, self._state.sequence.seen):
            self._forget_images()
        shape = shape_of(inputs)
        batch = self._state.sequence.batch
        if shape is not None and shape[1] > 1:
            take_offset(self._state.sequence, self._adapter, self._model(), inputs)
        self._mask = None
        if shape is not None and batch in (0, shape[0]):  # else the first layer says so
            padding, last_seen = inputs.get("attention_mask"), inputs.get(hooks.LAST_SEEN)
            self._mask = read_mask(self._state.sequence, padding, shape, last_seen)
            choosing.for_forward(self._state, shape[1], self._mask)
        if self._state.own:
            self._state.check_ready()
            self._state.own.unfinished = True

    # -- decoding, and after a forward ---------------------------------------------------------------------------------

    def plan_decoding(
        self, model: PreTrainedModel, inputs: dict[str, Any]
    ) -> tuple[dict[str, Any], hooks.Forward | None]:
        """Says how `generate` is to decode: arguments to add, and what stands in for the model's forward, if anything.

        Args:
            model: the model that generates.
            inputs: what `generate` was given.
        """
        return plan(self._decoding, self._state, model, inputs)

    def after_decoder(self) -> None:
        """Hears that the decoder came to its end; called by the hook on it."""
        self._state.own.unfinished = False

    def after_turn(self) -> None:
        """Does what the last step left to do, and forgets what `generate` was about to read and to generate."""
        if self._state.recording and self._in_turn and not self._recorded and self._state.is_ready():
            undoing.stop_recording(self._state)  # an assistant's
        periods.cut_if_due(self._state, asks=True)
        self._state.calls.due, self._state.coming, self._state.whole_prompt = None, 0, None
        self._in_turn, self._watch = False, None
        watching.end()

    def forget_forward(self) -> None:
        """Forgets what was told of a forward that failed."""
        self._layout = self._mask = None

    # -- images --------------------------------------------------------------------------------------------------------

    def _expect_images(self, is_image: Tensor, layout: Callable[[], ImageLayout | None]) -> None:
        """Takes note of which positions to come are images, and of their places if they are to be reduced.

        Raises:
            UnsupportedModeError: for an image to be reduced while the past is recorded.
        """
        if self.config.reducer is not None and bool(is_image.any()):
            if self._state.recording:
                raise UnsupportedModeError(
                    "reducer: an image cannot be reduced in a forward that may be undone (assisted decoding), "
                    "since tokens that are not accepted would have a say; generate without an assistant and prompt "
                    "lookup, or read the image in a forward of its own before activate_past_recording()"
                )
            self._layout, self._images_to_come = layout(), is_image
        self._state.sequence.mark_images(is_image)

    def _forget_images(self) -> None:
        """Drops what an earlier call said of images that never came."""
        self._layout, sequence = None, self._state.sequence
        if sequence.is_image is not None and sequence.is_image.shape[1] > sequence.seen:
            sequence.is_image = sequence.is_image[:, : sequence.seen]

    @property
    def _reads_tower(self) -> bool:
        reducer = self.config.reducer
        return reducer is not None and reducer.reads_tower and self._adapter.sees_images

    def _begin_watching(self, inputs: Mapping[str, Any]) -> None:
        """Looks at the vision tower from here on, if the reducer wants to know."""
        if self._reads_tower:
            assert self.config.reducer is not None
            self._watch = watching.begin(self.config.reducer, self._adapter, self.model(), inputs)

    def _seen_by_tower(self) -> TowerView | None:
        """What the tower says of the images of the forward that begins; None if the reducer does not ask."""
        if self._images_to_come is None or not self._reads_tower:
            return None
        if self._watch is None:  # nobody gave pixels
            self._begin_watching({})
            watching.end()
        (watch, self._watch), (images, self._images_to_come) = (self._watch, None), (self._images_to_come, None)
        assert watch is not None
        return watch.by_position(self._adapter, self.model(), images)


def _of_another(model: nn.Module) -> CacheStateError:
    return CacheStateError(
        f"cache: it was made for another model than this {type(model).__name__}; make a CompressedCache for each "
        "model, also for a copy of one"
    )
