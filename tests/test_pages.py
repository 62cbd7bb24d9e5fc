"""PagesLLaVA: what a page shows is what its record says, and the frozen SmolLM2 reads it as if it were text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from kvcompress.errors import ConfigError, MissingDependencyError
from kvcompress.evaluation import LoadedModel, evaluate, load_model
from kvcompress.evaluation.data import load_samples
from kvcompress.evaluation.pages import ASKED, KINDS, Page, draw_page, model, page_seed, question, sample_page
from kvcompress.evaluation.pages.contents import CELLS, LOOKS
from kvcompress.evaluation.pages.drawing import IMAGE_SIZE
from kvcompress.evaluation.pages.vocabulary import NUMBER, TOKENS, pieces, sentences

PAGES = [sample_page(kind, page_seed("test", number)) for number, kind in enumerate(KINDS * 2)]


def names(pages: list[Page]) -> list[str]:
    return [f"{page.kind} {page.seed}" for page in pages]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("pages")


# -- pages -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_a_fact_stands_where_the_page_says(page: Page) -> None:
    assert len(page.cells) == CELLS and all(cell in LOOKS for cell in page.cells)
    for fact in page.facts:
        shown = "".join(cell.text for cell in page.cells[fact.at :])
        assert shown.lstrip().startswith(fact.value) and page.text.count(f" {fact.name} ") >= 1


def test_a_page_follows_from_its_seed_and_so_do_its_pixels() -> None:
    for page in PAGES[: len(KINDS)]:
        again, other = sample_page(page.kind, page.seed), sample_page(page.kind, page.seed + 100)
        assert again == page and other.text != page.text
        first, second = np.asarray(draw_page(page)), np.asarray(draw_page(again))
        assert first.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and (first == second).all()


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_an_answer_is_how_the_page_goes_on_after_the_words_that_it_begins_with(page: Page) -> None:
    for kind, seed in ((page.kind, 0), (page.kind, 1), ("read", 0), ("read", 1)):
        asked = question(page, kind, seed)
        stretch = "".join(cell.text for cell in page.cells[asked.at : asked.at + asked.tokens])
        assert stretch.strip() == asked.answer.strip()
        assert asked.prefix + asked.answer in page.text


def test_no_two_splits_share_a_page() -> None:
    seeds = [page_seed(split, index) for split in ("test", "validation") for index in (0, 9_999_999)]
    assert sorted(set(seeds)) == sorted(seeds) and page_seed("train", 0) > max(seeds)
    with pytest.raises(ConfigError, match="known: test, validation, train"):
        page_seed("held", 0)
    with pytest.raises(ConfigError, match="from 0 to 9,999,999"):
        page_seed("test", 10_000_000)


def test_what_a_page_cannot_hold_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="unknown 'poem'; known: letter, table, chart, scene"):
        sample_page("poem", 0)
    with pytest.raises(ConfigError, match="is asked as table or read; got 'chart'"):
        question(PAGES[1], "chart")
    with pytest.raises(ConfigError, match="' zebra' is not in the vocabulary"):
        pieces(" The zebra")


@pytest.mark.parametrize(
    ("source", "said"),
    [("pages:kind=tabel", "did you mean 'table'.*known: letter"), ("pages:kind=7", "unknown '7'; known: letter")],
)
def test_a_kind_that_there_is_not_is_refused(source: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_samples(source, limit=1)


def test_samples_go_through_all_kinds_in_turn() -> None:
    samples = load_samples("pages", limit=len(ASKED) + 1)
    assert [sample.kind for sample in samples] == [*ASKED, ASKED[0]]
    assert all(sample.has_context and sample.answer_prefix and sample.answer for sample in samples)


# -- the model ---------------------------------------------------------------------------------------------------------


def test_the_weights_are_those_of_tower_and_projector_alone_and_small() -> None:
    weights = load_file(model.weights_file())
    assert {name.split(".")[0] for name in weights} == {"vision_tower", "multi_modal_projector"}
    assert all(weight.dtype == torch.float16 for weight in weights.values())
    assert model.weights_file().stat().st_size < 30e6 and (model.weights_file().parent / "README.md").is_file()


def test_missing_weights_say_where_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model, "_FOLDER", tmp_path)
    with pytest.raises(MissingDependencyError, match="train_pages_llava"):
        load_model("pages")


def test_merged_it_is_a_plain_llava_once_saved(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 32}
    config = transformers.LlamaConfig(vocab_size=50, hidden_size=576, tie_word_embeddings=True, **sizes)
    text: Any = transformers.LlamaForCausalLM(config)
    merged = model.merged(text, load_file(model.weights_file()), torch.float32)
    merged.save_pretrained(tmp_path)
    read: Any = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    state = merged.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in read.state_dict().items())
    rows = read.get_input_embeddings().weight
    assert torch.equal(rows[:50], text.get_input_embeddings().weight) and not rows[50:].any() and len(rows) == 51
    assert read.config.image_token_id == 50 and read.lm_head.weight is rows


def test_pages_are_made_of_single_tokens_and_cut_as_the_tokenizer_cuts_them(loaded: LoadedModel) -> None:
    tokenizer: Any = loaded.tokenizer
    ids = [tokenizer(token, add_special_tokens=False).input_ids for token in TOKENS]
    assert all(len(one) == 1 for one in ids)
    for cut in (*([cell.text for cell in page.cells] for page in PAGES), *sentences()):
        whole = tokenizer("".join(cut), add_special_tokens=False).input_ids
        assert whole == [ids[NUMBER[piece]][0] for piece in cut]


def test_the_processor_has_the_chat_template_of_smollm2_and_leaves_its_tokenizer(loaded: LoadedModel) -> None:
    from kvcompress.evaluation import smollm2

    processor: Any = loaded.processor
    text, tokenizer = smollm2.load(torch.float32)
    words = copy.deepcopy(tokenizer.get_vocab())
    built: Any = model.build_processor(tokenizer)
    assert tokenizer.get_vocab() == words and len(words) == text.config.vocab_size
    assert built.tokenizer.convert_tokens_to_ids("<image>") == loaded.model.config.image_token_id == len(words)
    for turns in (["user"], ["user", "assistant", "user"], ["system", "user"]):
        said = [{"role": role, "content": f"{role} says"} for role in turns]
        parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in said]
        wanted = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        for form in (said, parts):
            assert processor.apply_chat_template(form, add_generation_prompt=True, tokenize=False) == wanted


@pytest.mark.parametrize("page", PAGES[2:4], ids=names(PAGES[2:4]))
def test_every_patch_becomes_the_embedding_of_the_token_that_it_shows(loaded: LoadedModel, page: Page) -> None:
    processor: Any = loaded.processor
    pixels = processor(images=draw_page(page), text="<image>", return_tensors="pt").pixel_values
    llava: Any = loaded.model
    with torch.no_grad():
        seen = llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][0, 1:]
        found = llava.model.multi_modal_projector(seen)
    rows = llava.get_input_embeddings().weight
    ids = torch.tensor(loaded.tokenizer(page.text, add_special_tokens=False).input_ids)
    wanted = rows[ids]
    assert (torch.cdist(found, rows).argmin(1) == ids).float().mean() > 0.995
    assert (found - wanted).square().sum() < 0.01 * wanted.square().sum()


@pytest.mark.parametrize("mode", ["seen", "unseen"])
def test_it_answers_held_out_pages_with_the_full_cache(loaded: LoadedModel, mode: Any) -> None:
    samples = load_samples("pages:kind=table", limit=2)
    (row,) = evaluate(loaded, samples, [], metrics=["exact"], question=mode)
    assert row["metrics"]["exact"]["value"] >= 0.5
