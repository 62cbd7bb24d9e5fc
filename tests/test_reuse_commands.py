"""The commands for documents, conversations and captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from kvcompress.cli import app
from kvcompress.evaluation import captions, load_model
from kvcompress.reuse import Chat, Document
from tests import checkpoints

TEXT = "The red key is under the green mat. The dog sleeps in the garden. " * 2
FEW = ("--max-new-tokens", 5)


def run(*arguments: object, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save_image(tmp_path_factory.mktemp("llava"))


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        pixels = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- documents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_document_is_compressed_once_and_asked_later(kind: str, text: Path, llava: Path, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(TEXT)
    files = [tmp_path / "story.txt"] + ([pictures(tmp_path / "p", 1) / "0.png"] if kind == "image" else [])
    model, folder = llava if kind == "image" else text, tmp_path / "story.kv"
    made = run("compress", *files, "-o", folder, "--model", model, "--budget", "40%")
    assert made.exit_code == 0 and "tokens in" in made.stdout
    answers = run("ask", folder, "Where is the key?", "Why?", *FEW, "--json")
    loaded = load_model(str(model))
    document = Document.load(loaded.model, loaded.processor or loaded.tokenizer, folder)
    expected = document.ask(["Where is the key?", "Why?"], max_new_tokens=5)
    assert [one["answer"] for one in json.loads(answers.stdout)["answers"]] == expected
    assert run("ask", folder, "Why?", *FEW).stdout.strip() == expected[1].strip()
    again = run("compress", *files, "-o", folder, "--model", model)
    assert again.exit_code == 1 and "--overwrite replaces it" in again.stderr
    assert run("compress", *files, "-o", folder, "--model", model, "--overwrite").exit_code == 0


def test_what_is_no_document_is_told_in_a_line(text: Path, llava: Path, tmp_path: Path) -> None:
    for arguments, says in (
        (["ask", tmp_path, "Why?"], "make one: kvcompress compress"),
        (["compress", "missing.txt", "-o", tmp_path / "x", "--model", text], "FILE...: prompt missing.txt"),
        (["compress", "missing.png", "-o", tmp_path / "x", "--model", llava], "FILE...: image missing.png"),
        (["compress", pictures(tmp_path / "p", 1) / "0.png", "-o", tmp_path / "y", "--model", text], "needs a LLaVA"),
    ):
        result = run(*arguments)
        assert result.exit_code != 0 and result.stdout == "" and says in " ".join(result.stderr.split())
    assert not (tmp_path / "x").exists()  # files are read before a folder is made
    (tmp_path / "story.txt").write_text(TEXT)
    folder = tmp_path / "story.kv"
    assert run("compress", tmp_path / "story.txt", "-o", folder, "--model", text).exit_code == 0
    other = run("ask", folder, "Why?", "--model", checkpoints.save_text(tmp_path / "other", chat_template=None))
    assert other.exit_code == 0  # the same weights in another place
    another = run("ask", folder, "Why?", "--model", llava)
    assert another.exit_code == 1 and "saved from another model" in another.stderr
    (folder / "document.json").write_text("{}")
    assert "is none that kvcompress wrote" in run("ask", folder, "Why?").stderr
    assert run("compress", tmp_path / "story.txt", "-o", folder, "--model", text, "--overwrite").exit_code == 1


def test_an_image_for_a_text_model_is_refused_as_by_generate(text: Path, tmp_path: Path) -> None:
    (picture,) = pictures(tmp_path / "pictures", 1).iterdir()
    says = f"image: '{text}' is a text model (llama); an image needs a LLaVA model (llava, llava_next)"
    for arguments in (
        ("compress", picture, "-o", tmp_path / "picture.kv"),
        ("chat", "--image", picture),
        ("generate", "--image", picture, "--prompt", "what is it?"),
    ):
        result = run(*arguments, "--model", text)
        assert result.exit_code == 1 and result.stderr == f"error: {says}\n"


# -- conversations -----------------------------------------------------------------------------------------------------


def test_a_conversation_is_read_from_stdin(text: Path) -> None:
    said = "hello\n\n/report\nand you?\n/new\nhello\n/quit\nnever said\n"
    result = run("chat", "--model", text, "--budget", "50%", *FEW, stdin=said)
    loaded = load_model(str(text))
    chat = Chat(loaded.model, loaded.tokenizer, "auto", budget=0.5)
    first, second = (chat.say(one, max_new_tokens=5) for one in ("hello", "and you?"))
    assert result.exit_code == 0 and result.stdout == f"{first}\n{second}\n{first}\n"
    assert "tokens seen, retention" in result.stderr


def test_a_word_with_a_slash_is_a_command_or_is_answered_with_those_that_are(text: Path) -> None:
    result = run("chat", "--model", text, *FEW, stdin="/reprot\n/help\n/Quit\n/new now\n/zzz\n")
    assert result.exit_code == 0 and result.stdout == ""
    misspelt, help_, case, two_words, far = result.stderr.splitlines()
    assert misspelt.startswith("'/reprot' is no command; did you mean '/report'? /new begins a new conversation")
    assert all(name in help_ for name in ("/new", "/report", "/help", "/quit", "//"))
    assert "did you mean '/quit'?" in case and two_words.startswith("'/new' stands alone on its line; /new begins")
    assert far.startswith("'/zzz' is no command; /new begins a new conversation")


def test_two_slashes_say_a_text_that_begins_with_one(text: Path) -> None:
    loaded = load_model(str(text))
    chat = Chat(loaded.model, loaded.tokenizer, "auto")
    answer = chat.say("/etc/hosts", max_new_tokens=5)
    assert run("chat", "--model", text, *FEW, stdin="//etc/hosts\n").stdout == f"{answer}\n"


# -- captions ----------------------------------------------------------------------------------------------------------


def test_every_image_gets_a_line_and_a_stopped_run_goes_on(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole, path = pictures(tmp_path / "pictures", 5), tmp_path / "whole.jsonl", tmp_path / "captions.jsonl"
    given = ("caption", folder, "--model", llava, *FEW, "--prompt", "what is it?", "--preset", "full")
    assert run(*given, "-o", whole, "--batch-size", 1).exit_code == 0
    assert [line["image"] for line in lines(whole)] == [f"{number}.png" for number in range(5)]
    described, number = captions.caption_images, 0

    def stops(*arguments: Any) -> Any:
        nonlocal number
        number += 1
        if number == 2:
            raise KeyboardInterrupt
        return described(*arguments)

    monkeypatch.setattr("kvcompress.cli.caption.caption_images", stops)
    assert run(*given, "-o", path, "--batch-size", 2).exit_code == 130
    assert len(lines(path)) == 2
    with path.open("ab") as file:
        file.write(b'{"image": "2.pn')  # as a kill leaves it
    done = run(*given, "-o", path, "--batch-size", 2, "--json")
    assert json.loads(done.stdout) == {"output": str(path), "images": 5, "new": 3, "skipped": []}
    assert lines(path) == lines(whole)
    before = path.read_bytes()
    assert json.loads(run(*given, "-o", path, "--json").stdout)["new"] == 0
    other = run(*given[:-1], "streaming", "-o", path)
    assert other.exit_code == 1 and "another model, prompt or configuration" in other.stderr
    assert path.read_bytes() == before
    assert run(*given[:-1], "streaming", "-o", path, "--overwrite").exit_code == 0
    assert len(lines(path)) == 5


@pytest.mark.parametrize("content", [b"mine\n", b"mine", b"[1]\n", b'{"image": 3, "caption": "", "run": ""}\n'])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_somebody_else_is_left_alone(content: bytes, overwrite: bool, llava: Path, tmp_path: Path) -> None:
    folder, path = pictures(tmp_path / "pictures", 1), tmp_path / "notes.jsonl"
    path.write_bytes(content)
    result = run("caption", folder, "--model", llava, "-o", path, *(["--overwrite"] if overwrite else []))
    assert result.exit_code == 1 and "give another file" in result.stderr
    assert path.read_bytes() == content


def test_what_cannot_be_described_is_told_in_a_line(text: Path, llava: Path, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 1)
    for arguments, says in (
        ([tmp_path, "-o", tmp_path / "a.jsonl", "--model", llava], "there is none in"),
        ([folder, "-o", tmp_path / "a.txt", "--model", llava], "must end in .jsonl"),
        ([folder, "-o", tmp_path / "a.jsonl", "--model", text], "sees no images"),
    ):
        result = run("caption", *arguments)
        assert result.exit_code == 1 and says in " ".join(result.stderr.split())
    (folder / "0.png").write_bytes(b"no picture")
    result = run("caption", folder, "-o", tmp_path / "b.jsonl", "--model", llava, *FEW)
    assert result.exit_code == 1 and "none of 1 in" in result.stderr and "0.png" in result.stderr


def test_an_image_that_cannot_be_read_is_skipped_and_told(llava: Path, tmp_path: Path) -> None:
    folder, path = pictures(tmp_path / "pictures", 4), tmp_path / "captions.jsonl"
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(b"no picture")
    given = ("caption", folder, "-o", path, "--model", llava, *FEW, "--batch-size", 2, "--json")
    done = run(*given)
    (skipped,) = json.loads(done.stdout)["skipped"]
    assert done.exit_code == 0 and [line["image"] for line in lines(path)] == ["0.png", "2.png", "3.png"]
    assert skipped["image"] == "1.png" and f"image '1.png' was skipped: {skipped['reason']}" in done.stderr
    (folder / "1.png").write_bytes(whole)
    again = json.loads(run(*given).stdout)
    assert again["new"] == 1 and not again["skipped"] and lines(path)[-1]["image"] == "1.png"
