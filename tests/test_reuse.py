"""Documents, conversations, and blocks in which every `generate` is compressed."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    TextIteratorStreamer,
    pipeline,
)

import kvcompress
from kvcompress import CompressedCache, restore
from kvcompress.cache.argument import cache_argument
from kvcompress.errors import CacheStateError, ConfigError, UnsupportedModeError, UnsupportedModelError
from kvcompress.reuse import Chat, Document, compressing
from kvcompress.reuse.prompts import Prompter
from tests import checkpoints, tiny

TEXT = "The red key is under the green mat. The dog sleeps in the garden, and the cat is out. " * 2
QUESTIONS = ["Where is the key?", "And the dog, where does it sleep at night?", "Why?"]
PRESETS = ("full", "prefixkv", "prefixkv+int4", "h2o", "snapkv", "streaming", "text", "kivi4")
Pair = tuple[PreTrainedModel, Any]


@functools.cache
def text() -> Pair:
    return checkpoints.text_model(), checkpoints.text_tokenizer()


@pytest.fixture(scope="module")
def sighted(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = checkpoints.save_image(tmp_path_factory.mktemp("llava"))
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def picture(seed: int) -> Any:
    pixels = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def budget(name: str) -> dict[str, Any]:
    return {} if name in ("full", "kivi4") else {"budget": 0.5}


# -- documents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seen", [False, True], ids=["text", "images"])
@pytest.mark.parametrize("name", PRESETS)
def test_ten_questions_of_a_loaded_document_are_answered_as_by_the_first(
    name: str, seen: bool, sighted: Pair, tmp_path: Path
) -> None:
    model, processor = sighted if seen else text()
    images = [picture(1), picture(2)] if seen else []
    document = Document(model, processor, TEXT, images=images, config=name, **budget(name))
    questions = [f"{question} {number}" for number in range(4) for question in QUESTIONS][:10]
    document.save(tmp_path)
    loaded = Document.load(model, processor, tmp_path)
    wanted = {"max_new_tokens": 4, "batch_size": 5}
    assert loaded.ask(questions, **wanted) == document.ask(questions, **wanted)
    assert loaded.report() == document.report()


@pytest.mark.parametrize("seen", [False, True], ids=["text", "images"])
def test_a_document_that_is_repeated_is_scored_by_that(seen: bool, sighted: Pair, tmp_path: Path) -> None:
    model, processor = sighted if seen else text()
    images = [picture(1)] if seen else []
    document = Document(model, processor, TEXT, images=images, config="snapkv", scorer="kvzip", budget=0.4)
    inputs, _ = Prompter(model, processor).document(TEXT, images)
    cache = CompressedCache(model, "snapkv", scorer="kvzip", budget=0.4)
    cache.score_by_reconstruction(getattr(processor, "tokenizer", processor), inputs)
    assert document.report() == cache.report() and document.report().retention <= 0.4
    document.save(tmp_path)
    loaded = Document.load(model, processor, tmp_path)
    assert loaded.ask(QUESTIONS, max_new_tokens=4) == document.ask(QUESTIONS, max_new_tokens=4)


ASKS = """
import json, sys
import transformers
from kvcompress import Document
of_model, of_reader = (getattr(transformers, name) for name in sys.argv[2:4])
model, reader = of_model.from_pretrained(sys.argv[1]).eval(), of_reader.from_pretrained(sys.argv[1])
questions, names = json.loads(sys.argv[5]), sys.argv[6:]
documents = [Document.load(model, reader, f"{sys.argv[4]}/{name}") for name in names]
print(json.dumps([document.ask(questions, max_new_tokens=4, batch_size=5) for document in documents]))
"""


@pytest.mark.parametrize("seen", [False, True], ids=["text", "images"])
def test_another_process_answers_ten_questions_as_the_one_that_read(seen: bool, sighted: Pair, tmp_path: Path) -> None:
    folder = checkpoints.save_image(tmp_path / "model") if seen else checkpoints.save_text(tmp_path / "model")
    classes = ("AutoModelForImageTextToText", "AutoProcessor") if seen else ("AutoModelForCausalLM", "AutoTokenizer")
    model, processor = sighted if seen else text()
    images = [picture(1), picture(2)] if seen else []
    questions = [f"{question} {number}" for number in range(4) for question in QUESTIONS][:10]
    wanted = []
    for name in PRESETS:
        document = Document(model, processor, TEXT, images=images, config=name, **budget(name))
        document.save(tmp_path / "documents" / name)
        wanted.append(document.ask(questions, max_new_tokens=4, batch_size=5))
    given = [str(folder), *classes, str(tmp_path / "documents"), json.dumps(questions), *PRESETS]
    done = subprocess.run([sys.executable, "-c", ASKS, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == wanted


@pytest.mark.parametrize("seen", [False, True], ids=["text", "images"])
def test_the_first_turn_of_a_conversation_is_repeated_for_a_scorer_that_wants_it(seen: bool, sighted: Pair) -> None:
    """All of it but its last token; the rest of the conversation is as with any scorer."""
    model, processor = sighted if seen else text()
    images = [picture(1)] if seen else []
    chat, how = Chat(model, processor, "kvzip", budget=0.4), {"max_new_tokens": 4}
    first = Prompter(model, processor).turn(TEXT, images, first=True)
    ids, mask = (first.pop(name) for name in ("input_ids", "attention_mask"))
    cache = CompressedCache(model, "kvzip", budget=0.4)
    inputs = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1], **first}
    cache.score_by_reconstruction(getattr(processor, "tokenizer", processor), inputs)
    output = model.generate(ids, attention_mask=mask, **cache_argument(cache), do_sample=False, **how)
    tokenizer = getattr(processor, "tokenizer", processor)
    assert chat.say(TEXT, images=images, **how) == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert chat.report() == cache.report() and not any("nothing was repeated" in note for note in chat.report().notes)
    assert chat.say(QUESTIONS[0], **how) and chat.report().retention <= 0.4


def test_a_document_with_images_is_repeated_too(sighted: Pair) -> None:
    free, images = {"fraction": 0.4, "sink": 1, "recent": 1}, [picture(1), picture(2)]
    chosen = Document(*sighted, TEXT, images=images, budget=0.4)
    named = Document(*sighted, TEXT, images=images, config="kvzip", budget=free)
    assert chosen.report().preset == "kvzip" and chosen.report().retention <= 0.4
    assert chosen.report().held_positions == named.report().held_positions
    assert chosen.ask(QUESTIONS, max_new_tokens=4) == named.ask(QUESTIONS, max_new_tokens=4)


@pytest.mark.parametrize("chat", [False, True])
def test_a_question_is_answered_as_if_it_were_the_only_one(chat: bool) -> None:
    document = Document(*text(), TEXT, config="prefixkv", budget=0.5, chat=chat)
    before = document.report()
    alone = [document.ask(question, max_new_tokens=6) for question in QUESTIONS]
    assert document.ask(QUESTIONS, max_new_tokens=6, batch_size=3) == alone
    assert document.ask(QUESTIONS[::-1], max_new_tokens=6, batch_size=2) == alone[::-1]
    assert document.report() == before


@pytest.mark.parametrize("chat", [False, True])
def test_with_everything_kept_an_answer_is_that_of_the_whole_prompt(chat: bool) -> None:
    model, tokenizer = text()
    document = Document(model, tokenizer, TEXT, config="full", chat=chat)
    said = f"{TEXT.strip()}\n\n{QUESTIONS[0]}"
    if chat:
        messages = [{"role": "user", "content": said}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").input_ids
    else:
        ids = tokenizer(said, return_tensors="pt").input_ids
    output = checkpoints.text_model().generate(ids, max_new_tokens=6, do_sample=False)
    assert document.ask(QUESTIONS[0], max_new_tokens=6) == tokenizer.decode(output[0, ids.shape[1] :])


def test_images_come_before_the_text(sighted: Pair) -> None:
    model, processor = sighted
    document = Document(model, processor, "what is this", images=[picture(1)], config="full")
    other = Document(model, processor, "what is this", images=[picture(2)], config="full")
    assert document.report().image_tokens[0] == [4]
    assert document.ask("colour?", max_new_tokens=8) != other.ask("colour?", max_new_tokens=8)


def test_what_cannot_be_a_document_or_a_question_is_refused(tmp_path: Path) -> None:
    model, tokenizer = text()
    with pytest.raises(ConfigError, match="document: is empty"):
        Document(model, tokenizer, "  ")
    with pytest.raises(UnsupportedModelError, match="need a LLaVA model and its processor"):
        Document(model, tokenizer, TEXT, images=[picture(1)])
    with pytest.raises(ConfigError, match="no chat template"):
        Document(model, checkpoints.text_tokenizer(None), TEXT, chat=True)
    document = Document(model, tokenizer, TEXT)
    with pytest.raises(ConfigError, match="questions: one of them is empty"):
        document.ask(["why?", " "])
    assert document.ask([]) == []
    document.cache.save(tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"without a document; .*CompressedCache\.load"):
        Document.load(model, tokenizer, tmp_path / "cache")
    document.save(tmp_path / "document")
    other = checkpoints.text_tokenizer()
    other.add_tokens(["more"])
    with pytest.raises(ConfigError, match="another vocabulary"):
        Document.load(model, other, tmp_path / "document")
    assert CompressedCache.load(model, tmp_path / "document").report() == document.report()


# -- conversations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [checkpoints.TEXT_CHAT, None], ids=["chat", "plain"])
def test_a_conversation_goes_on_from_what_was_said(template: str | None) -> None:
    model, tokenizer = checkpoints.text_model(), checkpoints.text_tokenizer(template)
    chat = Chat(model, tokenizer, "full")
    said = ""
    for question in QUESTIONS:
        said += f"U:{question}\nA:" if template else f"\n{question}" if said else question
        ids = tokenizer(said, return_tensors="pt").input_ids
        output = checkpoints.text_model().generate(ids, max_new_tokens=5, do_sample=False)
        answer = tokenizer.decode(output[0, ids.shape[1] :])
        assert chat.say(question, max_new_tokens=5) == answer
        said = tokenizer.decode(output[0]) + ("\n" if template else "")
        if not said.isascii():
            break  # bytes that are no text cannot be written down and read again


def test_a_conversation_about_images_goes_on(sighted: Pair) -> None:
    model, processor = sighted
    chat, plain, pixels = Chat(model, processor, "full"), copy.deepcopy(model), []
    restore(plain)
    for number, question in enumerate(QUESTIONS):
        images = [picture(number)] if number != 1 else []  # one at the start, one later
        pixels += [processor.image_processor(image, return_tensors="pt").pixel_values for image in images]
        answer = chat.say(question, images=images, max_new_tokens=5)
        ids = chat._said.ids[:, :-5]
        assert int((ids == model.config.image_token_id).sum()) == 4 * len(pixels)
        output = plain.generate(ids, pixel_values=torch.cat(pixels), max_new_tokens=5, do_sample=False)
        assert answer == processor.tokenizer.decode(output[0, -5:], skip_special_tokens=True)


def test_a_conversation_stays_within_its_budget_and_begins_anew() -> None:
    chat = Chat(*text(), "prefixkv", budget=24)
    first = [chat.say(question, max_new_tokens=20) for question in QUESTIONS]
    assert max(map(max, chat.report().layer_lengths)) <= 3 * 24
    assert sum(map(sum, chat.report().layer_lengths)) <= 3 * 24
    chat.reset()
    assert [chat.say(question, max_new_tokens=20) for question in QUESTIONS] == first


def test_an_interrupted_answer_is_told_at_the_next() -> None:
    chat = Chat(*text(), "prefixkv", budget=0.5)
    chat.say("hello", max_new_tokens=3)

    class Stops(TextIteratorStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.say("go on", streamer=Stops(text()[1], skip_prompt=True))
    with pytest.raises(CacheStateError, match=r"interrupted; call reset\(\)"):
        chat.say("still there?")
    chat.reset()
    chat.say("hello", max_new_tokens=3)


# -- blocks in which everything is compressed --------------------------------------------------------------------------


def tokens(model: PreTrainedModel, **wanted: Any) -> list[int]:
    inputs = tiny.inputs("llama", 30, seed=3)
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, **wanted)[0].tolist()


def compressed(name: str, **overrides: Any) -> list[int]:
    model = tiny.build("llama")
    return tokens(model, **tiny.with_cache(CompressedCache(model, name, **overrides)))


def test_every_generate_inside_is_compressed_and_none_outside() -> None:
    model = tiny.build("llama")
    before = dict(model.__dict__)
    with kvcompress.compressing(model, "streaming", budget=0.3) as session:
        inside = [tokens(model), tokens(model)]
    assert inside == [compressed("streaming", budget=0.3)] * 2
    assert [report.retention <= 0.3 for report in session.reports] == [True] * 2
    assert tokens(model) == tokens(tiny.build("llama")) and len(session.reports) == 2
    restore(model)
    assert dict(model.__dict__).keys() == before.keys()


def test_blocks_nest_and_the_innermost_serves() -> None:
    model = tiny.build("llama")
    with compressing(model, "streaming", budget=0.3) as outer:
        with compressing(model, "full") as inner:
            assert tokens(model) == tokens(tiny.build("llama"))
        assert tokens(model) == compressed("streaming", budget=0.3)
    assert len(outer.reports) == len(inner.reports) == 1


@pytest.mark.parametrize("touched", [False, True])
def test_a_block_that_fails_leaves_generate_as_it_was(touched: bool) -> None:
    model = tiny.build("llama")
    if touched:
        CompressedCache(model, "full")
    own = model.__dict__.get("generate")
    with pytest.raises(ZeroDivisionError), compressing(model, "streaming", budget=0.3):
        with pytest.raises(RuntimeError), compressing(model, "full"):
            raise RuntimeError
        raise ZeroDivisionError
    assert type(model.generate).__name__ == "Generate"
    assert own is None or model.generate is own
    assert tokens(model) == tokens(tiny.build("llama"))
    with pytest.raises(ConfigError), compressing(model, "prefx"):
        pass
    assert type(model.generate).__name__ == "Generate"


def test_each_thread_has_its_own_block() -> None:
    model, names = tiny.build("llama"), ["streaming", "full", "snapkv", "h2o"]
    expected = {name: compressed(name, **budget(name)) for name in names}
    found: dict[str, list[list[int]]] = {name: [] for name in names}
    together = threading.Barrier(len(names))

    def run(name: str) -> None:
        for _ in range(3):
            together.wait()
            with compressing(model, name, **budget(name)):
                together.wait()
                found[name].append(tokens(model))

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: [expected[name]] * 3 for name in names}
    assert type(model.generate).__name__ == "Generate"


def test_a_folder_without_a_document_is_refused_with_what_makes_one(tmp_path: Path) -> None:
    model, tokenizer = text()
    with pytest.raises(ConfigError, match=r"none.*make a new CompressedCache or Document and read the prompt again"):
        Document.load(model, tokenizer, tmp_path / "none")


def test_a_thread_without_a_block_follows_the_one_that_is_open() -> None:
    model, tokenizer = text()
    ids = tokenizer(TEXT, return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    with compressing(model, "prefixkv", budget=0.5) as session:
        thread = threading.Thread(target=model.generate, kwargs={**ids, "streamer": streamer, "max_new_tokens": 5})
        thread.start()
        streamed = "".join(streamer)
        thread.join()
    assert streamed and len(session.reports) == 1


def test_a_cache_of_ones_own_is_left_alone_and_no_cache_refused() -> None:
    model = tiny.build("llama")
    with compressing(model, "streaming", budget=0.3) as session:
        full = DynamicCache(config=model.config)
        assert tokens(model, **tiny.with_cache(full)) == tokens(tiny.build("llama"))
        with pytest.raises(UnsupportedModeError, match=r"use_cache=False: .*outside of the"):
            tokens(model, use_cache=False)
    assert not session.reports


def test_a_cache_of_transformers_by_its_name_is_refused() -> None:
    model = tiny.build("llama")
    with compressing(model, "streaming", budget=0.3) as session:
        with pytest.raises(UnsupportedModeError, match=r"cache_implementation='static': .*outside of the block"):
            tokens(model, cache_implementation="static")
        asked = GenerationConfig(cache_implementation="offloaded", max_new_tokens=2)
        with pytest.raises(UnsupportedModeError, match=r"cache_implementation='offloaded': "):
            model.generate(tiny.token_ids(1, 5, 0), asked)
        model.generation_config.cache_implementation = "quantized"
        with pytest.raises(UnsupportedModeError, match=r"cache_implementation='quantized': .*None where the model's"):
            tokens(model)
        assert not session.reports
        answers = [tokens(model, cache_implementation=None)]
        for default in ("hybrid", None):  # the first of Gemma 2 and 3 as they were saved
            model.generation_config.cache_implementation = default
            answers.append(tokens(model))
        assert len(session.reports) == 3 and answers == [answers[0]] * 3


def test_a_copy_of_the_model_is_in_no_block() -> None:
    model = tiny.build("llama")
    with compressing(model, "streaming", budget=0.3) as session:
        twin = copy.deepcopy(model)
        assert tokens(twin) == tokens(tiny.build("llama"))
    assert not session.reports


def test_restore_inside_a_block_is_kept() -> None:
    model = tiny.build("llama")
    with compressing(model, "streaming", budget=0.3):
        restore(model)
    assert "generate" not in model.__dict__
    assert tokens(model) == tokens(tiny.build("llama"))


def test_pipelines_run_inside(sighted: Pair) -> None:
    model, tokenizer = text()
    with compressing(model, "prefixkv", budget=0.5) as session:
        write = pipeline("text-generation", model=model, tokenizer=tokenizer)
        answers = write([TEXT, QUESTIONS[1]], max_new_tokens=5, batch_size=2, do_sample=False)
        assert len(answers) == 2
    assert [len(report.row_tokens_seen) for report in session.reports] == [2]
    model, processor = sighted
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": "what is it?"}]}
    ]
    with compressing(model, "streaming", budget=0.5) as session:
        look = pipeline("image-text-to-text", model=model, processor=processor)
        assert look(text=messages, max_new_tokens=5, generate_kwargs={"do_sample": False})[0]["generated_text"]
    assert session.reports[0].image_tokens[0] == [4] and session.reports[0].retention <= 0.5
