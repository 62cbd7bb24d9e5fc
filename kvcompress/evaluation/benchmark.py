"""Speed and memory of any caches on any model, run in turns: what `kvcompress bench` shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.config import CompressionConfig
from kvcompress.errors import ConfigError
from kvcompress.evaluation.contestants import BASE, QUANTIZED, REFERENCES, Contestant, contestants_of
from kvcompress.evaluation.extension import prepare_extension, shown
from kvcompress.evaluation.measurement import Measurement, Spread
from kvcompress.evaluation.memory import peak_of
from kvcompress.evaluation.models import LoadedModel
from kvcompress.evaluation.perplexity import english_text
from kvcompress.evaluation.repetition import check_read_once
from kvcompress.evaluation.timing import in_turns, ratios, short_collections
from kvcompress.progress import progress_bar

_LETTERS = 12  # of text for each token that is wanted, enough for any tokenizer of words


def benchmark(
    loaded: LoadedModel,
    configs: Sequence[tuple[str, CompressionConfig]],
    *,
    prompt_tokens: Sequence[int] = (1000,),
    batches: Sequence[int] = (1,),
    new_tokens: int = 16,
    rounds: int = 5,
    references: Sequence[str] = REFERENCES,
    memory_limit: int | None = None,
    on_round: Callable[[], None] | None = None,
    on_wait: Callable[[str], None] | None = None,
    progress: bool = False,
) -> Iterator[Measurement]:
    """Measures caches against transformers' own, in turns, so that a busy machine slows all of them alike.

    A round reads a batch of prompts (English text, each row another piece) into a new cache and takes greedy steps. The
    first round of each cache has the memory to itself, warms up and tells the peak; the others are timed. On a CPU all
    caches take each step in turns, so that the memory must hold all of them; on a GPU each has a round to itself.
    References are `DynamicCache`; `QuantizedCache` (quanto, four bits, residual of 128); and the floor: a prompt read
    without any cache, and steps with a cache of one token, which is what the weights alone cost.

    Args:
        loaded: the model.
        configs: what is compared, by name; one name may come with several budgets.
        prompt_tokens: lengths of the prompts.
        batches: numbers of prompts at a time.
        new_tokens: steps after the first token.
        rounds: timed rounds.
        references: some of `REFERENCES`; ratios need `DynamicCache`. A `QuantizedCache` that does not work here, as
            where optimum-quanto's extension cannot be compiled, has a note and no figures.
        memory_limit: bytes that weights and caches may take, for the largest batch; the GPU's memory if None, else
            unlimited.
        on_round: called after each round, warm-up included; `rounds_of` tells how many there are.
        on_wait: is told what is going on before a wait that is no round, as for a compiler.
        progress: whether a bar on stderr shows how many rounds are done.

    Yields:
        Measurements of a batch and length at a time, references first, in order.

    Raises:
        ConfigError: if a number is below 1, a reference is unknown, or a scorer wants the prompt to be repeated.

    Example:
        >>> from kvcompress import CompressionConfig
        >>> from kvcompress.evaluation import load_model
        >>> from kvcompress.evaluation.benchmark import benchmark
        >>> config = CompressionConfig.preset("prefixkv", budget=0.2)
        >>> found = list(benchmark(load_model("shapes"), [("prefixkv", config)], prompt_tokens=[200], rounds=1))
        >>> ", ".join(measurement.policy for measurement in found)
        'DynamicCache, QuantizedCache, floor, prefixkv'
    """
    _check(prompt_tokens, batches, new_tokens, rounds, references)
    check_read_once(dict(configs), "a benchmark", "time cache.score_by_reconstruction(tokenizer, inputs) by itself")
    model = loaded.model
    if memory_limit is None and model.device.type == "cuda":
        memory_limit = torch.cuda.get_device_properties(model.device).total_memory
    missing = None
    if QUANTIZED in references:
        missing = prepare_extension(model.device, on_wait or (lambda message: None))
    total = rounds_of(len(configs), len(prompt_tokens), len(batches), rounds, len(references))
    with progress_bar(progress, "rounds", total) as tell:
        done = count(1)

        def told() -> None:
            tell(next(done))
            if on_round is not None:
                on_round()

        for tokens in prompt_tokens:
            for batch in batches:
                ids = text_rows(loaded, batch, tokens)
                contestants = contestants_of(model, configs, references, new_tokens, missing)
                with short_collections():
                    _compete(model, contestants, ids, rounds, new_tokens, told)
                yield from _measurements(contestants, ids, model, memory_limit)


def rounds_of(configs: int, prompt_tokens: int, batches: int, rounds: int, references: int = len(REFERENCES)) -> int:
    """Rounds that a benchmark has, warm-up included, from how many of each there are."""
    return (configs + references) * prompt_tokens * batches * (rounds + 1)


def text_rows(loaded: LoadedModel, batch: int, tokens: int) -> Int[Tensor, "batch tokens"]:
    """Pieces of English text, another one for each row as far as it reaches, on the model's device."""
    text = english_text()[: _LETTERS * batch * tokens]
    ids = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    rows: Tensor = ids.repeat(math.ceil(batch * tokens / len(ids)))[: batch * tokens].view(batch, tokens)
    return rows.to(loaded.model.device)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _compete(
    model: PreTrainedModel,
    contestants: list[Contestant],
    ids: Tensor,
    rounds: int,
    new_tokens: int,
    on_round: Callable[[], None],
) -> None:
    """Lets each contestant run once alone, then all of them in turns."""
    for contestant in contestants:
        try:
            if contestant.note is None:
                contestant.peak = peak_of(partial(list, contestant.play(contestant, ids)), model.device)
        except torch.OutOfMemoryError:
            contestant.note = "out of memory"
        except Exception as error:
            if not contestant.optional:
                raise
            contestant.note = f"unavailable: {shown(error)}"
        on_round()
    running = [contestant for contestant in contestants if contestant.note is None]
    # A GPU's clock is steady and its memory scarce: there each has a round to itself.
    groups = [[one] for one in running] if model.device.type == "cuda" else [running]
    for _ in range(rounds):
        for group in groups:
            laps: dict[str, Callable[[], float]] = {
                str(n): partial(next, one.play(one, ids)) for n, one in enumerate(group)
            }
            times = in_turns(laps, new_tokens + 1, warm_up=0)
            for one, (first, *later) in zip(group, times.values(), strict=True):
                one.first.append(first)
                one.later += later
                on_round()


def _measurements(
    contestants: Sequence[Contestant], ids: Tensor, model: PreTrainedModel, memory_limit: int | None
) -> Iterator[Measurement]:
    batch, tokens = ids.shape
    base = next((one for one in contestants if one.policy == BASE and one.note is None), None)
    for one in contestants:
        about = (one.policy, *one.budget, tokens, batch)
        if one.note is not None:
            yield Measurement(*about, note=one.note)
            continue
        row_bytes = _row_bytes(one, model, batch)
        yield Measurement(
            *about,
            seconds_to_first_token=Spread.of(one.first),
            seconds_per_token=Spread.of(one.later),
            tokens_per_second=Spread.of([batch / seconds for seconds in one.later]),
            first_token_ratio=None if base is None else ratios({"base": base.first, "own": one.first}, "base")["own"],
            per_token_ratio=None if base is None else ratios({"base": base.later, "own": one.later}, "base")["own"],
            held_bytes=one.held,
            peak_bytes=one.peak,
            row_bytes=row_bytes,
            largest_batch=None
            if memory_limit is None or not row_bytes
            else max(0, (memory_limit - weight_bytes(model)) // row_bytes),
        )


def _row_bytes(contestant: Contestant, model: PreTrainedModel, batch: int) -> int | None:
    """Bytes that a row takes: peak on a GPU, where it is exact, else held; None for the floor, which holds nothing."""
    taken = contestant.peak if model.device.type == "cuda" and contestant.held is not None else contestant.held
    return None if taken is None else -(-taken // batch)


def _check(
    prompt_tokens: Sequence[int], batches: Sequence[int], new_tokens: int, rounds: int, references: Sequence[str]
) -> None:
    for name, values in (
        ("prompt_tokens", prompt_tokens),
        ("batches", batches),
        ("new_tokens", [new_tokens]),
        ("rounds", [rounds]),
    ):
        if not values or min(values) < 1:
            raise ConfigError(f"{name}: must be at least 1; got {', '.join(map(str, values)) or 'none'}")
    unknown = [name for name in references if name not in REFERENCES]
    if unknown:
        raise ConfigError(f"references: unknown '{unknown[0]}'; known: {', '.join(REFERENCES)}")
