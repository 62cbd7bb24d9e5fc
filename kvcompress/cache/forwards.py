"""The way of a forward through the layers of a compressed cache."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.cache import attention, decoding, hooks, mask_function, periods, prefill, undoing
from kvcompress.cache.masks import Mask
from kvcompress.cache.observing import Observes
from kvcompress.cache.owner import WeightsOf
from kvcompress.cache.reduction import Reduction
from kvcompress.cache.renumbering import lost_before, moved_back
from kvcompress.cache.state import CacheState
from kvcompress.cache.step import Prefill
from kvcompress.errors import CacheStateError, UnsupportedModeError
from kvcompress.integrations import Adapter
from kvcompress.kernels import Softmax

_COMPILED = (
    "torch.compile: a compiled forward reads one token of every row, after a prompt that was read without compilation; "
    "call generate, or read the prompt with the model inside (compiled._orig_mod). Where layers slide or sum up, "
    "none are compiled"
)
_CUT_BY_HAND = (
    "torch.compile: the evictor cuts layers between decode steps, which only `generate` leaves room for; call "
    "generate, let the steps run without compilation, or choose an evictor that frees a token in each step (topk)"
)


class Forwards(Observes, hooks.ReducesTokens):
    """What a forward calls: the hooks on decoder layers, and the attention."""

    def __init__(self, state: CacheState, adapter: Adapter, model: PreTrainedModel, decoding: str) -> None:
        """Between two forwards.

        Raises:
            ConfigError: if there is no such way of decoding.
        """
        super().__init__(state, adapter, model, decoding)
        # Compressed layers, numbered among themselves.
        self._place = {number: place for place, number in enumerate(state.numbers)}

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
            weights = WeightsOf(self._adapter, self._decoder, weakref.ref(module))
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
            undoing.stop_recording(state, entered=True)  # nobody cropped, so nobody is rolling back
        (says, self._mask), (layout, self._layout) = (self._mask, None), (self._layout, None)
        if queries == 1 and state.sequence.seen and says is None:
            decoding.begin(state)
        else:
            says = says or Mask(None, None, np.full(batch, queries), None)
            tower = None if layout is None else self._seen_by_tower()
            prefill.begin(state, queries, device, says, layout, tower)

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

    def know_weights(self) -> None:
        """Lets layers know their weights before they ran; where they are cut in periods, that may be due before."""
        attentions = map(self._adapter.attention_of, self._adapter.layers(self.model()))
        numbered = {number: module for number, module in enumerate(attentions) if module is not None}
        for number, place in self._place.items():
            weights = WeightsOf(self._adapter, self._decoder, weakref.ref(numbered[number]))
            self._state.layers[place].weights = weights


def _usable(tensor: Tensor) -> Tensor:
    """A tensor that the caller may use, also where it was made in an inference mode that the caller is not in."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor if torch.is_inference_mode_enabled() else tensor.clone()
