"""The side of a compressed cache that follows a forward: what hooks tell of it, and its way through the layers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.cache import (
    attention,
    choosing,
    decoding,
    hooks,
    mask_function,
    periods,
    prefill,
    tables,
    undoing,
    watching,
)
from kvcompress.cache.axes import check_positions, give_offset, take_offset
from kvcompress.cache.capture import plan
from kvcompress.cache.inputs import check_types, shape_of
from kvcompress.cache.masks import Mask, read_mask
from kvcompress.cache.owner import OfModel, alive
from kvcompress.cache.reduction import Reduction
from kvcompress.cache.renumbering import lost_before, moved_back
from kvcompress.cache.state import CacheState
from kvcompress.cache.step import Prefill
from kvcompress.cache.window import check_forward, check_turn
from kvcompress.errors import CacheStateError, ConfigError, UnsupportedModeError
from kvcompress.integrations import Adapter
from kvcompress.kernels import Softmax
from kvcompress.policies.context import LayerWeights, TowerView
from kvcompress.policies.images import ImageLayout

_COMPILED = (
    "torch.compile: a compiled forward reads one token of every row, after a prompt that was read without compilation; "
    "call generate, or read the prompt with the model inside (compiled._orig_mod). Where layers slide or sum up, "
    "none are compiled"
)
_CUT_BY_HAND = (
    "torch.compile: the evictor cuts layers between decode steps, which only `generate` leaves room for; call "
    "generate, let the steps run without compilation, or choose an evictor that frees a token in each step (topk)"
)


class Forwards(OfModel, hooks.ObservesInputs, hooks.ReducesTokens):
    """What a forward calls: the hooks on the model, on its decoder and its layers, and the attention."""

    def __init__(self, state: CacheState, adapter: Adapter, model: PreTrainedModel, decoding: str) -> None:
        """Between two forwards.

        Raises:
            ConfigError: if there is no such way of decoding.
        """
        super().__init__(state, adapter, model)
        if decoding not in ("captured", "compiled", "eager"):
            raise ConfigError(f"decoding: must be 'captured', 'compiled' or 'eager'; got {decoding!r}")
        self._decoding, self.window, state.typed = decoding, adapter.window(model), adapter.typed
        # Compressed layers, numbered among themselves.
        self._place = {number: place for place, number in enumerate(state.numbers)}
        self._layout: ImageLayout | None = None  # of the images of the forward about to begin
        self._in_turn = False  # of `generate`
        self._watch: watching.Watch | None = None  # of the vision tower that makes the features to come
        self._images_to_come: Tensor | None = None
        self._mask: Mask | None = None  # what the mask of the forward about to begin says, if anything

    # -- before a forward ----------------------------------------------------------------------------------------------

    def before_turn(self, model: PreTrainedModel, inputs: dict[str, Any]) -> None:
        """Looks at what `generate` was given, before it cuts off what was seen.

        Args:
            model: the model that generates.
            inputs: what `generate` was given.

        Raises:
            CacheStateError: if the ids do not begin with what the cache has seen, or the mask does not cover it.
            UnsupportedModeError: for a row of padding alone.
        """
        tables.catch_up_if_needed(self._state)
        check_turn(self.window, self._adapter, model, inputs)
        self._state.calls.turn(inputs, self._state.sequence.seen)
        give_offset(self._state.sequence, self._adapter, self._model())
        self._in_turn = True
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
            if self.config.reducer is not None and bool(is_image.any()):
                if self._state.recording:
                    raise UnsupportedModeError(
                        "reducer: an image cannot be reduced in a forward that may be undone (assisted decoding), "
                        "since tokens that are not accepted would have a say; generate without an assistant and prompt "
                        "lookup, or read the image in a forward of its own before activate_past_recording()"
                    )
                self._layout, self._images_to_come = layout(), is_image
            self._state.sequence.mark_images(is_image)

    def before_decoder(self, decoder: nn.Module, inputs: dict[str, Any]) -> None:
        """Looks at the decoder that is about to run and at its inputs; called by the hook on it.

        Raises:
            CacheStateError: if the cache was made for another model.
            UnsupportedModeError: if the decoder was called by itself where a policy has to know what is an image.
        """
        if torch.compiler.is_compiling():
            return
        watching.end()
        if self.decoder() is not decoder:
            raise CacheStateError(
                f"cache: it was made for another model than this {type(decoder).__name__}; make a CompressedCache for "
                "each model, also for a copy of one"
            )
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

    # -- a step --------------------------------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes the new tokens of a layer; the attention function stores them.

        Raises:
            CacheStateError: if an earlier forward failed half-way, the cache belongs to another model, or the hooks did
                not see the call.
            UnsupportedModeError: if the model trains or its attention was switched away.
        """
        state, own = self._state, self._state.own.layers.get(layer_idx)
        if not torch.compiler.is_compiling():
            if layer_idx == state.own.first_updated:
                self.check_decoder()
                if not state.early:
                    state.check_ready(entered=True)
            state.calls.check(layer_idx - state.own.first_updated)
            state.calls.hands_over(None if own is not None else layer_idx)
        layers = len(state.layers) + len(state.own.layers)
        if layer_idx >= layers:
            raise CacheStateError(f"layer {layer_idx}: the cache was made for a model of {layers} layers")
        if own is not None:
            found: tuple[Tensor, Tensor] = own.update(key_states, value_states, *args, **kwargs)
            return found
        return attention.attach(key_states, self, layer_idx), value_states

    def attend(
        self,
        layer: int,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        softmax: Softmax,
    ) -> Tensor:
        """Takes a layer through the step in progress, which the first layer begins and the last ends."""
        state = self._state
        if torch.compiler.is_compiling():
            outside = self.window is not None and not self._in_turn  # where nobody counts
            if query.shape[2] > 1 or state.table is None or state.own or outside:
                raise UnsupportedModeError(_COMPILED)
            if state.cut is not None and not self._in_turn:
                raise UnsupportedModeError(_CUT_BY_HAND)
        else:
            state.calls.attends(layer, module)
        layer = self._place[layer]
        if layer == 0 and not state.early:
            self._begin(query.shape[0], query.shape[2], query.device)
        step = state.step
        if isinstance(step, Prefill) and step.last_seen is None:
            mask_function.check_causal(module, mask, first=1 < step.queries == state.sequence.seen)
        if step is None or step.next_layer != layer:
            raise state.broken()
        with state.writable():
            weights = _Weights(self._adapter, self._decoder, weakref.ref(module))
            output = state.layers[layer].attend(step, state.table, query, key, value, softmax, weights)
            step.next_layer += 1
            if step.next_layer == len(state.layers):
                self._end()
        return _usable(output)

    def _begin(self, batch: int, queries: int, device: torch.device) -> None:
        """Makes the step of a forward, and takes note of its tokens."""
        state = self._state
        if decoding.host_is_left_out(state):  # in decode steps alone, after a prefill step that made the table
            decoding.begin(state)
            return
        state.check_ready(entered=True)
        if state.sequence.batch not in (0, batch):
            raise CacheStateError(
                f"batch: the cache holds {state.sequence.batch} rows, this forward has {batch}; call reset() for "
                "another batch, or batch_repeat_interleave / batch_select_indices to change the rows"
            )
        if state.waiting is not None:
            self._stop_recording()  # nobody cropped after the last forward, so nobody is rolling back
        (says, self._mask), (layout, self._layout) = (self._mask, None), (self._layout, None)
        if queries == 1 and state.sequence.seen and says is None:
            decoding.begin(state)
        else:
            says = says or Mask(None, None, np.full(batch, queries), None)
            tower = None if layout is None else self._seen_by_tower()
            prefill.begin(state, queries, device, says, layout, tower)

    def _stop_recording(self) -> None:
        """Lets what waited for `crop` happen, which nobody calls any more."""
        self._state.recording = False
        undoing.compress(self._state, entered=True)
        self._state.own.record(False)

    def _end(self) -> None:
        """Brings every layer within its budget that is not yet, and forgets the step."""
        state = self._state
        step = state.step
        if isinstance(step, Prefill):
            prefill.end(state, step)
            state.step, state.reduced = None, step.reduction
        else:
            state.reduced = None
            decoding.end(state)
            if not decoding.host_is_left_out(state):
                periods.cut_if_due(state)

    # -- reducing ------------------------------------------------------------------------------------------------------

    def reduce(self, layer: int, hidden: Tensor) -> tuple[Tensor, Reduction] | None:
        """What goes into a decoder layer where a reducer acts; called by the hooks on the layers."""
        if torch.compiler.is_compiling():
            return None
        state = self._state
        state.calls.layer(layer)
        if layer == 0 and prefill.reduces_first(state) and not decoding.host_is_left_out(state):
            state.check_ready()
            if self._layout is not None:
                self._begin(hidden.shape[0], hidden.shape[1], hidden.device)
        found = prefill.reduce(state, layer, hidden)
        return None if found is None else (_usable(found[0]), found[1])

    def spread_between(self, layer: int, hidden: Tensor) -> Tensor | None:
        """What comes out of a layer, at all positions, for a model that adds to it there; called by hooks on layers.

        The tokens that go on are taken from it again before the next layer.
        """
        step = self._state.step
        reduction = step.reduction if isinstance(step, Prefill) else None
        if reduction is None or layer < reduction.points[0]:
            return None
        return reduction.spread_between(hidden)

    def renumber(self, layer: int, positions: dict[str, Any]) -> dict[str, Any]:
        """Positions that count a layer's own tokens, for reducers that have such; called by the hooks on the layers."""
        lost = lost_before(self._state, layer)
        if lost is None:
            return {}
        rotary = getattr(self._decoder(), "rotary_emb", None)
        return moved_back(positions, lost, getattr(rotary, "inv_freq", None))

    def spread(self, hidden: Tensor) -> Tensor | None:
        """What comes out of the last layer, zero for tokens that a reducer took away; called by the hook on it."""
        reduction, self._state.reduced = self._state.reduced, None
        return None if reduction is None else reduction.spread(hidden)

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
        periods.cut_if_due(self._state, asks=True)
        self._state.calls.due, self._state.coming, self._state.whole_prompt = None, 0, None
        self._in_turn, self._watch = False, None
        watching.end()

    def know_weights(self) -> None:
        """Lets layers know their weights before they ran; where they are cut in periods, that may be due before."""
        attentions = map(self._adapter.attention_of, self._adapter.layers(self.model()))
        numbered = {number: module for number, module in enumerate(attentions) if module is not None}
        for number, place in self._place.items():
            weights = _Weights(self._adapter, self._decoder, weakref.ref(numbered[number]))
            self._state.layers[place].weights = weights

    def forget_forward(self) -> None:
        """Forgets what was told of a forward that failed."""
        self._layout = self._mask = None


@dataclass(frozen=True)
class _Weights:
    """Gives the weights of a layer, without keeping its model alive."""

    adapter: Adapter
    decoder: weakref.ReferenceType[PreTrainedModel]
    module: weakref.ReferenceType[nn.Module]

    def __call__(self) -> LayerWeights:
        return self.adapter.layer_weights(alive(self.decoder), alive(self.module))


def _usable(tensor: Tensor) -> Tensor:
    """A tensor that the caller may use, also where it was made in an inference mode that the caller is not in."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor if torch.is_inference_mode_enabled() else tensor.clone()
