"""Documents and conversations with models that want to be told what each token is, and what callers get wrong."""

from __future__ import annotations

import inspect
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from kvcompress.errors import ConfigError, UnsupportedModeError
from kvcompress.evaluation import encode_prompt
from kvcompress.evaluation.models import LoadedModel
from kvcompress.evaluation.shapes import measure, questions, scenes
from kvcompress.reuse import Chat, Document
from kvcompress.testing.models import TEXT as TEXT_MODEL
from tests import checkpoints, families, tiny, vision
from tests.vision import FAMILIES, IMAGE

TYPED = ("gemma3", "paligemma", "paligemma2")
AXES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TEXT, QUESTION = "what is in this picture? I wonder about it.", "and so?"
WORDS = {"suppress_tokens": list(range(vision.MARKS, IMAGE + 1))}  # an answer holds no image
NEW = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


class Encoding(dict[str, Any]):
    @property
    def input_ids(self) -> Any:
        return self["input_ids"]


class Tokenizer:
    """A token a letter, with `token_type_ids` of zeros, as tokenizers of pairs of texts give them."""

    pad_token_id, eos_token_id, bos_token, chat_template = 0, None, None, None

    def __call__(self, text: str, return_tensors: str | None = None, **_: Any) -> Encoding:
        ids = [2 + ord(letter) % 80 for letter in text]
        if return_tensors is None:
            return Encoding(input_ids=ids)
        whole = torch.tensor([ids])
        return Encoding(input_ids=whole, attention_mask=torch.ones_like(whole), token_type_ids=torch.zeros_like(whole))

    def decode(self, ids: Any, **_: Any) -> str:
        return str(torch.as_tensor(ids).tolist())

    def batch_decode(self, rows: Tensor, **_: Any) -> list[str]:
        return [self.decode(row) for row in rows]


class Processor:
    """Writes each picture as its size says, before the text, as the family's own processor does."""

    chat_template, image_token = None, "@"

    def __init__(self, name: str) -> None:
        self.family, self.tokenizer = FAMILIES[name], Tokenizer()

    def __call__(self, images: list[vision.Size], text: str, **_: Any) -> dict[str, Any]:
        said = text.replace("@\n", "")
        inputs = self.family.prompt([[*(("image", size) for size in images), len(said)]])
        inputs["input_ids"][:, -len(said) :] = self.tokenizer(said, return_tensors="pt").input_ids
        return inputs

    def apply_chat_template(self, messages: list[Any], **_: Any) -> str:
        return "@\n" + str(messages[0]["content"][-1]["text"])


class Square(Processor):
    """Takes true pictures as if they were of the family's first size, and always gives types."""

    def __call__(self, images: Any, text: Any, **_: Any) -> dict[str, Any]:
        rows = text if isinstance(text, list) else [text]
        inputs = super().__call__([self.family.sizes[0]] * len(rows), rows[0])
        return {"token_type_ids": torch.zeros_like(inputs["input_ids"]), **inputs}


def answered(name: str, ids: Tensor, **more: Any) -> list[int]:
    """The answer of the plain model to a whole prompt."""
    output = tiny.untouched(name).generate(ids, attention_mask=torch.ones_like(ids), **more, **NEW)
    return output[0, ids.shape[1] :].tolist()


# -- types of tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TYPED, *AXES, "llava_next_video", "mistral3", "idefics3"])
def test_with_everything_kept_a_document_with_images_is_answered_as_by_the_plain_model(name: str) -> None:
    """Which is given what the processor says of the document; the question, which comes after, attends causally."""
    family, processor = FAMILIES[name], Processor(name)
    document = Document(tiny.model(name), processor, TEXT, images=list(family.sizes[:2]), config="full")
    inputs = processor(list(family.sizes[:2]), f"{TEXT}\n\n")
    asked = processor.tokenizer(QUESTION, return_tensors="pt").input_ids
    del inputs["attention_mask"]
    ids = torch.cat([inputs.pop("input_ids"), asked], 1)
    for types in inputs.keys() & {"token_type_ids", "mm_token_type_ids"}:
        causal = int(family.typed == "prompt")
        inputs[types] = torch.nn.functional.pad(inputs[types], (0, asked.shape[1]), value=causal)
    wanted = answered(name, ids, **inputs)
    assert document.ask(QUESTION, max_new_tokens=6) == str(wanted)
    assert document.ask([QUESTION, "why? " * 3], max_new_tokens=6)[0] == str(wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_document_with_images_is_repeated_by_models_that_can(name: str) -> None:
    """Pixels and all; others are read once. Either way the budget holds, and the answer is of what is held."""
    family, processor = FAMILIES[name], Processor(name)
    images = list(family.sizes[:2])
    document = Document(tiny.model(name), processor, TEXT * 3, images=images, budget=0.4)
    can = family.axes == 1 and family.typed is None
    report = document.report()
    assert report.preset == ("kvzip" if can else "image") and report.retention <= 0.4
    asked = document.ask([QUESTION, "why?"], max_new_tokens=3)
    assert asked[0] == document.ask(QUESTION, max_new_tokens=3) and document.report() == report


QUESTIONS = ["and so?", "why? " * 4, "x", "in what?", "y", QUESTION]  # some of one token, some of one length


MIXED = [(name, "full") for name in families.EVERY if name not in (*families.FULL, *families.WINDOWED)] + [
    ("gemma2", "auto"),
    ("lfm2", "auto"),
]


@pytest.mark.parametrize(("name", "config"), [("llama", one) for one in ("full", "auto", "prefixkv", "tova")] + MIXED)
def test_questions_that_are_answered_together_are_answered_as_alone(name: str, config: str) -> None:
    """Also where padding between document and question would count, in windows and states."""
    budget = {} if config == "full" else {"budget": 0.3}
    document = Document(tiny.model(name), Tokenizer(), TEXT * 4, config=config, **budget)
    assert document.cache.counts_padding == (name != "llama")
    alone = [document.ask(question, max_new_tokens=5) for question in QUESTIONS]
    assert document.ask(QUESTIONS, max_new_tokens=5) == alone
    assert document.ask(QUESTIONS[::-1], max_new_tokens=5, batch_size=2) == alone[::-1]
    together = QUESTIONS[:2] if name == "llama" else ["and so?", "why not"]
    inputs, cache = unchecked(document.prepare)(iter(together))
    assert inputs["input_ids"].dtype == torch.int64 and cache.batch_size == 2
    for apart in (["x", "why?"], *([] if name == "llama" else [QUESTIONS[:2]])):
        with pytest.raises(ConfigError, match="questions: 2 of different lengths would not be answered as each alone"):
            document.prepare(apart)


def test_what_a_generation_config_says_of_an_answer_holds() -> None:
    model, config = tiny.model("llama"), GenerationConfig(max_new_tokens=3)
    document, chat = Document(model, Tokenizer(), TEXT * 4, budget=0.5), Chat(model, Tokenizer(), budget=0.5)
    for ask in (document.ask, chat.say):
        answer = ask(QUESTION, generation_config=config)
        assert answer.count(",") == 2 and config.do_sample is None and config.pad_token_id is None
        more: dict[str, Any] = {"pad_token_id": 0, "max_length": None, "do_sample": False}
        assert ask(QUESTION, max_new_tokens=4, generation_config=config, **more).count(",") == 3
        with pytest.raises(
            ConfigError, match=r"max_length: counts what was read .*; give max_new_tokens; got 9 \(int\)"
        ):
            ask(QUESTION, max_length=9)
    hot = GenerationConfig(max_new_tokens=20, do_sample=True, temperature=50.0)
    torch.manual_seed(0)
    assert len({document.ask(QUESTION, generation_config=hot) for _ in range(3)}) == 3


def test_a_model_whose_window_a_repetition_would_leave_reads_a_document_once() -> None:
    config = transformers.MistralConfig(**TEXT_MODEL, sliding_window=300)
    document = Document(transformers.MistralForCausalLM(config).eval(), Tokenizer(), TEXT * 4, budget=0.4)
    assert document.report().preset == "text" and document.ask(QUESTION, max_new_tokens=3)


def test_types_are_dropped_where_the_model_reads_none() -> None:
    """Models of text refuse them; those of Gemma 3 have nothing to say of a text alone, which may then be repeated."""
    for name, processor in (("llama", Tokenizer()), ("llava_next_video", Processor("llava_next_video"))):
        assert Document(tiny.model(name), processor, TEXT, config="full").ask(QUESTION, max_new_tokens=2)
        assert Chat(tiny.model(name), processor, "full").say(QUESTION, max_new_tokens=2)
    document = Document(tiny.model("gemma3"), Processor("gemma3"), TEXT * 4, config="snapkv", scorer="kvzip")
    assert document.ask(QUESTION, max_new_tokens=2)


@pytest.mark.parametrize("name", [*TYPED, "vipllava"])
def test_prompts_that_are_evaluated_keep_the_types_that_the_model_reads(name: str) -> None:
    tokenizer = checkpoints.text_tokenizer(None)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    loaded = LoadedModel(name, tiny.model(name), tokenizer, Square(name))
    scene = scenes.sample_scene(1)
    for inputs in (
        encode_prompt(loaded, TEXT, image="a picture", chat=False),
        measure.encode(loaded, [(scene, questions.describe_question(scene))]),
    ):
        assert ("token_type_ids" in inputs) == (name in TYPED)
    text = LoadedModel("llama", tiny.model("llama"), tokenizer)
    assert "token_type_ids" in tokenizer(TEXT)
    assert encode_prompt(text, TEXT).keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("turns", [(0, 1), (1, 0), (1, 1, 0, 2), (0, 2, 1)], ids=str)
@pytest.mark.parametrize("name", [*AXES, "gemma3", "llava_next_video"])
def test_with_everything_kept_a_conversation_is_answered_as_if_it_were_read_anew(
    name: str, turns: tuple[int, ...]
) -> None:
    """Whichever turns bring images: so many in each."""
    family, processor, chat = FAMILIES[name], Processor(name), Chat(tiny.model(name), Processor(name), "full")
    ids, is_image = torch.empty(1, 0, dtype=torch.long), torch.empty(1, 0, dtype=torch.bool)
    pixels: dict[str, Tensor] = {}
    for number, images in enumerate(turns):
        sizes = [family.sizes[(number + at) % 3] for at in range(images)]
        new = processor(sizes, "\n" * (number > 0) + f"{TEXT}{number}")
        ids, is_image = torch.cat([ids, new["input_ids"]], 1), torch.cat([is_image, new["input_ids"] == IMAGE], 1)
        for key in new.keys() - {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}:
            pixels[key] = torch.cat([pixels[key], new[key]]) if key in pixels else new[key]
        types = {"token_type_ids": family.typed, "mm_token_type_ids": family.axes > 1}
        more = {key: is_image.int() for key, wants in types.items() if wants and pixels}
        wanted = answered(name, ids, **pixels, **more, **WORDS)
        assert chat.say(f"{TEXT}{number}", images=sizes, max_new_tokens=6, **WORDS) == str(wanted)
        ids = torch.cat([ids, torch.tensor([wanted])], 1)
        is_image = torch.nn.functional.pad(is_image, (0, len(wanted)))


@pytest.mark.parametrize("name", ["paligemma", "paligemma2"])
def test_images_of_a_later_turn_are_refused_where_a_whole_prompt_attends_both_ways(name: str) -> None:
    chat, size = Chat(tiny.model(name), Processor(name), "full"), FAMILIES[name].sizes[0]
    with pytest.raises(
        UnsupportedModeError, match=r"images: PaliGemma.* in the first turn .* there are none in it; say"
    ):
        chat.say(TEXT)
    assert chat.report().tokens_seen == 0
    answers = [chat.say(TEXT, images=[size], max_new_tokens=3), chat.say(QUESTION, max_new_tokens=3)]
    with pytest.raises(
        UnsupportedModeError, match=r"images: .* they come in a later one; say .* \(reset\(\) begins anew"
    ):
        chat.say(TEXT, images=[size])
    chat.say(QUESTION, max_new_tokens=3)
    chat.reset()
    assert [chat.say(TEXT, images=[size], max_new_tokens=3), chat.say(QUESTION, max_new_tokens=3)] == answers


# -- arguments of generate ---------------------------------------------------------------------------------------------

REFUSED = {
    "num_beams": (2, r"must be 1 here, .*; leave it out, or sample .*; got 2 \(int\)"),
    "num_return_sequences": (2, r"must be 1 here, .*; leave it out, and ask again .*; got 2"),
    "return_dict_in_generate": (True, "must be False here, .*; leave it out; got True"),
    "prompt_lookup_num_tokens": (2, "must be None here, .*; leave it out, .*; got 2"),
    "assistant_model": ("another", "must be None here, .*; leave it out, .*; got 'another'"),
    "input_ids": (torch.ones(1, 1), r"is made here, .* got one of the type Tensor\. Leave it out"),
    "past_key_values": (None, "is made here, .*CompressedCache of your own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_do_not_go_with_an_answer_are_refused_before_anything_runs(name: str) -> None:
    """And the conversation goes on as if nothing had been said."""
    (value, match), model = REFUSED[name], tiny.model("llama")
    document = Document(model, Tokenizer(), TEXT, config="full")
    chat, other = Chat(model, Tokenizer(), "full"), Chat(model, Tokenizer(), "full")
    with pytest.raises(ConfigError, match=f"^{name}: {match}"):
        document.ask(QUESTION, **{name: value})
    for said in (TEXT, QUESTION):
        with pytest.raises(ConfigError, match=f"^{name}: {match}"):
            chat.say(said, **{name: value})
        assert chat.say(said, max_new_tokens=3) == other.say(said, max_new_tokens=3)
        assert chat.report() == other.report()


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences", "return_dict_in_generate"])
def test_a_generation_configuration_is_looked_at_and_that_of_the_model_gives_way(name: str) -> None:
    model, value = tiny.build("llama"), REFUSED[name][0]
    more = {"do_sample": True} if name == "num_return_sequences" else {}
    chat, document = Chat(model, Tokenizer(), "full"), Document(model, Tokenizer(), TEXT, config="full")
    with pytest.raises(ConfigError, match=f"^{name}: must be"):
        chat.say(TEXT, generation_config=GenerationConfig(**{name: value}, **more))
    wanted = chat.say(TEXT, max_new_tokens=3), document.ask(QUESTION, max_new_tokens=3)
    model.generation_config.update(**{name: value}, **more)
    chat.reset()
    assert (chat.say(TEXT, max_new_tokens=3), document.ask(QUESTION, max_new_tokens=3)) == wanted
    allowed = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
    assert document.ask(QUESTION, max_new_tokens=3, **allowed) == wanted[1]


def test_one_answer_at_a_time_is_streamed() -> None:
    document = Document(tiny.model("llama"), Tokenizer(), TEXT, config="full")
    streamer = TextStreamer(Tokenizer(), skip_prompt=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"streamer: a TextStreamer takes one answer .*, and 2 .* pass batch"):
        document.ask([QUESTION, "why?"], streamer=streamer)
    asked = document.ask([QUESTION, "why?"], streamer=streamer, batch_size=1, max_new_tokens=2)
    assert asked == document.ask([QUESTION, "why?"], max_new_tokens=2)


# -- what is no text ---------------------------------------------------------------------------------------------------


def unchecked(call: Any) -> Any:
    """Without the types that the tests check, as users call it."""
    if inspect.isclass(call):
        return lambda *args, **kwargs: inspect.unwrap(call.__init__)(call.__new__(call), *args, **kwargs)
    return partial(inspect.unwrap(call.__func__), call.__self__)


@pytest.mark.parametrize("make", [Document, Chat])
def test_a_processor_that_is_none_is_named(make: Any) -> None:
    for wrong, shown in (
        (TEXT, "'what is in this.*' .str."),
        (None, "None"),
        (SimpleNamespace(tokenizer=3), ".*Simple"),
    ):
        with pytest.raises(ConfigError, match=f"^processor: the second argument must be .*tokenizer.*; got {shown}"):
            make(tiny.model("llama"), wrong, budget=0.5)


def test_what_is_no_text_is_named() -> None:
    model = tiny.model("llama")
    document, chat = Document(model, Tokenizer(), TEXT, config="full"), Chat(model, Tokenizer(), "full")
    with pytest.raises(
        ConfigError, match=r"^text: must be a text \(str\), or None .*; got \['a', 'b'\] \(list\); join"
    ):
        unchecked(Document)(model, Tokenizer(), ["a", "b"])
    with pytest.raises(ConfigError, match=r"^text: must be a text .*; got 3 \(int\)$"):
        unchecked(Document)(model, Tokenizer(), 3)
    with pytest.raises(ConfigError, match=r"^images: must be a list of PIL images; got 7 .* pass images="):
        unchecked(Document)(model, Tokenizer(), TEXT, images=7)
    for wrong, shown in ((["a"], r"\['a'\] \(list\); join"), (None, "None"), (b"a", r"b'a' \(bytes\)$")):
        with pytest.raises(ConfigError, match=rf"^text: must be a text \(str\); got {shown}"):
            unchecked(chat.say)(wrong)
    for wrong, match in ((None, "sequence of texts .*; got None"), (["a", 3], r"got 3 \(int\) at index 1")):
        for ask in (document.ask, document.prepare):
            with pytest.raises(ConfigError, match=f"^questions: must be .*{match}"):
                unchecked(ask)(wrong)
    with pytest.raises(ConfigError, match=r"questions: must be a sequence of texts .*; got 'why"):
        unchecked(document.prepare)("why?")
    for nothing in ([], [""], ["why?", ""]):
        with pytest.raises(ConfigError, match="questions: there is none, or one of them is empty; give at least one"):
            document.prepare(nothing)
    for count in (0, -1, "2", 1.5, None, True):
        with pytest.raises(ConfigError, match=r"batch_size: must be a whole number of at least 1; got .* \(|got None"):
            unchecked(document.ask)(QUESTION, batch_size=count)
    assert chat.say(TEXT, max_new_tokens=2) and document.ask(QUESTION, max_new_tokens=2)
