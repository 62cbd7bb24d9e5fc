"""What the hooks tell a cache of the call in progress, and whether they told it: a hook that is dead says nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from kvcompress.cache.inputs import check_inputs, check_rows, check_use, not_the_conversation, shape_of, too_short
from kvcompress.errors import CacheStateError, UnsupportedModeError, UnsupportedModelError

_RESET = "call reset() and run the prompt again"
_MOST = 128  # ids of a prompt that are remembered


class _Read(NamedTuple):
    """Some of the ids of a prompt: every `stride`-th one from position `first` on; zero in `mask` marks padding."""

    first: int
    stride: int
    ids: Tensor
    mask: Tensor | None


class Calls:
    """Follows each call from the model through its decoder to the first layer.

    Attributes:
        needs_ids: whether a policy has to know which tokens are images.
        sees_images: whether the model does.
        reduces: whether the hooks on the layers have to be there too.
        due: ids that `generate` was given and has not read; None but for the first call of a later turn.
        waits: layer that handed its keys to the cache and is yet to attend; None if none is.
    """

    def __init__(self, needs_ids: bool, sees_images: bool, reduces: bool) -> None:
        """Starts with nothing told."""
        self.needs_ids = needs_ids
        self.sees_images = sees_images
        self.reduces = reduces
        self._announced: tuple[int, int] | None = None  # by the model: rows and tokens
        self._entered = False  # the decoder
        self._layer: int | None = None  # that a layer's hook spoke of
        self._read: list[_Read] = []
        self.due: Tensor | None = None
        self.waits: int | None = None

    def saved(self) -> list[dict[str, Any]]:
        """What has to be kept of the conversation to go on elsewhere."""
        return [read._asdict() for read in self._read]

    def restore(self, saved: Any) -> None:
        """Takes over what `saved` gave."""
        self._read = [_Read(**read) for read in saved]

    # -- what hooks tell -----------------------------------------------------------------------------------------------

    def model(self, inputs: dict[str, Any], seen: int, recording: bool) -> None:
        """The model was called.

        Raises:
            UnsupportedModeError: for what `check_inputs` refuses, and embeddings where ids are needed.
            CacheStateError: for a turn that does not carry the conversation.
        """
        check_inputs(inputs, seen)
        shape, ids = shape_of(inputs), inputs.get("input_ids")
        begins = not seen or self.due is not None
        self._check_due(ids)
        if ids is None and self.needs_ids and shape is not None and shape[1] > 1:
            raise UnsupportedModeError(
                "inputs_embeds: a policy of this cache treats image tokens otherwise than text and cannot tell them "
                "from embeddings; pass input_ids, or choose policies that do not (reducer=None, image_weight=1)"
            )
        self._announced, self._entered, self._layer = shape, False, None
        if ids is not None and ids.shape[1] > 1 and (begins or not recording):  # else candidates, taken on trust
            self._remember(ids, inputs.get("attention_mask"), seen)

    def decoder(self, inputs: dict[str, Any], seen: int) -> bool:
        """The decoder was called; whether the user did that, rather than the model.

        Raises:
            UnsupportedModeError: for what `check_inputs` refuses, and where a policy needs to see the model's own call.
            CacheStateError: for a turn that does not carry the conversation.
        """
        if self.waits is not None:
            raise CacheStateError(
                f"cache: in the last forward the keys of layer {self.waits} reached no attention: it failed half-way, "
                f"or the model attends otherwise than through transformers' attention interface; {_RESET}"
            )
        shape, announced = shape_of(inputs), self._announced
        self._announced = None
        direct = announced is None or announced != shape
        if direct:
            several = shape is not None and shape[1] > 1
            if self.needs_ids and several and (self.sees_images or inputs.get("input_ids") is None):
                raise UnsupportedModeError(
                    "model: its decoder was called by itself, and a policy of this cache has to know which tokens are "
                    "images, which only the call of the whole model tells; call model(input_ids, ...), or choose "
                    "policies that treat images as text (reducer=None, image_weight=1)"
                )
            check_inputs(inputs, seen)
        self._entered, self._layer = True, None
        return direct

    def layer(self, index: int) -> None:
        """A layer was called."""
        self._layer = index

    # -- what the cache asks -------------------------------------------------------------------------------------------

    def check(self, layer: int) -> None:
        """Refuses to go on where a hook that should have spoken did not.

        Raises:
            CacheStateError: naming the installed transformers and the ways out.
        """
        if layer == 0:
            entered, self._entered = self._entered, False
            if not entered:
                raise CacheStateError(_unseen("the call of the model", "its"))
        if self.reduces:
            reached, self._layer = self._layer, None
            if reached != layer:
                raise CacheStateError(_unseen(f"the call of layer {layer}", "the layers'"))

    def hands_over(self, layer: int | None) -> None:
        """A layer hands its keys to the cache, to attend right after; None for one that is not compressed.

        Raises:
            UnsupportedModelError: if the keys of the layer before reached no attention.
        """
        waits, self.waits = self.waits, layer
        if waits is not None:
            raise UnsupportedModelError(
                f"model: the keys of layer {waits} did not reach the attention 'kvcompress' as the cache gave them to "
                "the model: it changes them on the way, or attends otherwise than through transformers' attention "
                "interface. A compressed cache cannot serve it; use another cache"
            )

    def attends(self, layer: int, module: nn.Module) -> None:
        """A layer attends with the keys that it handed over.

        Raises:
            UnsupportedModelError: if it did already.
        """
        waits, self.waits = self.waits, None
        if waits != layer:
            raise UnsupportedModelError(
                f"model: {type(module).__name__} attends more than once to the keys of layer {layer}, or to those of "
                "another layer, which a compressed cache does not know; use another cache"
            )

    def turn(self, inputs: dict[str, Any], seen: int) -> None:
        """`generate` begins.

        Raises:
            UnsupportedModeError: for a row of padding alone, and `use_cache=False`.
            CacheStateError: for ids that do not begin with what was seen, and a mask that does not cover it.
        """
        check_use(inputs)
        mask, shape = inputs.get("attention_mask"), shape_of(inputs)
        check_rows(mask)
        if not seen or shape is None:
            return
        tokens, ids = shape[1], inputs.get("input_ids")
        covered = mask.shape[1] if isinstance(mask, Tensor) else tokens
        if covered > tokens:  # the new ids alone, with the mask of all
            if covered < seen + tokens:
                raise CacheStateError(too_short(seen, tokens))
        elif tokens <= seen or not (ids is None or self._begins(ids)):
            raise CacheStateError(not_the_conversation(seen, tokens))
        if ids is not None:
            self.due = ids if covered > tokens else ids[:, seen:]

    # -- the conversation ----------------------------------------------------------------------------------------------

    def crop(self, positions: int) -> None:
        """Forgets what was told of all but the first positions."""
        kept = []
        for read in self._read:
            left = -(-(positions - read.first) // read.stride)
            if left > 0:
                mask = None if read.mask is None else read.mask[:, :left]
                kept.append(read._replace(ids=read.ids[:, :left], mask=mask))
        self._read = kept

    def select_rows(self, index: Tensor) -> None:
        """Reorders, repeats or drops rows."""
        for number, read in enumerate(self._read):
            index = index.to(read.ids.device)
            mask = None if read.mask is None else read.mask.index_select(0, index)
            self._read[number] = read._replace(ids=read.ids.index_select(0, index), mask=mask)

    def _remember(self, ids: Tensor, mask: Tensor | None, seen: int) -> None:
        self.crop(seen)  # a forward that failed may have come this far
        stride = -(-ids.shape[1] // _MOST)
        own = None if mask is None else (mask[:, seen : seen + ids.shape[1] : stride] != 0).to(ids.device)
        self._read.append(_Read(seen, stride, ids[:, ::stride].to(torch.int32, copy=True), own))

    def _check_due(self, ids: Tensor | None) -> None:
        """Refuses what is not the first of the new tokens, the first time that `generate` calls the model in a turn."""
        due, self.due = self.due, None
        if due is None or ids is None:
            return
        due = _repeated(due, len(ids))[:, : ids.shape[1]].to(ids.device)
        if not torch.equal(due, ids):
            raise CacheStateError(
                f"input: generate of transformers {transformers.__version__} is about to read other tokens than the "
                "new ones: it reads a conversation from its start with an assistant or prompt lookup, and some "
                "releases before 5.24 with prefill_chunk_size; leave out assistant_model, prompt_lookup_num_tokens and "
                "prefill_chunk_size in later turns"
            )

    def _begins(self, ids: Tensor) -> bool:
        """Whether the ids begin with what was read; positions of padding may hold anything."""
        for read in self._read:
            own = _repeated(ids, len(read.ids))[:, read.first :: read.stride][:, : read.ids.shape[1]].to(
                read.ids.device
            )
            if own.shape == read.ids.shape:
                same = own == read.ids
                if not bool((same if read.mask is None else same | (read.mask == 0)).all()):
                    return False
        return True


def _repeated(ids: Tensor, rows: int) -> Tensor:
    """The ids as `generate` repeats them for beams and several answers."""
    return ids if rows % len(ids) else ids.repeat_interleave(rows // len(ids), dim=0)


def _unseen(what: str, whose: str) -> str:
    return (
        f"cache: no hook saw {what} that uses this cache (transformers {transformers.__version__}). If that is another "
        f"model than the cache was made for, make a CompressedCache for it. If {whose} hooks were removed, make a new "
        "CompressedCache(model, ...), which puts them back. Otherwise this release of transformers calls its models in "
        "a way that kvcompress does not know: install one between 5.20 and 5.24"
    )
