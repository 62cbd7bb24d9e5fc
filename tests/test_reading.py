"""Files of strangers: what is no plain data, or a bomb, is refused in one clear line, and at once."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kvcompress import Budget, CompressionConfig, KVCompressError
from kvcompress.config.profile import LayerProfile
from kvcompress.errors import ConfigError, shown
from kvcompress.evaluation.conversations import read_conversations
from kvcompress.evaluation.data import Sample, data_hash, load_samples
from kvcompress.files import open_picture, parse_json, parse_yaml, picture_path, read_structure, read_text
from kvcompress.files.pictures import FORMATS
from kvcompress.files.reading import DEPTH, DIGITS
from kvcompress.policies.registry import ALLOCATORS, REGISTRIES

# What reads a file that a user names, by the ending of the file.
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "config.yaml": (".yaml", CompressionConfig.load),
    "config.json": (".json", CompressionConfig.load),
    "profile.yaml": (".yaml", LayerProfile.load),
    "profile.json": (".json", LayerProfile.load),
    "allocator.yaml": (".yaml", lambda path: ALLOCATORS.create("profile", path=path)),
    "allocator.json": (".json", lambda path: ALLOCATORS.create("profile", path=str(path))),
    "prefixkv": (".json", lambda path: LayerProfile.from_prefixkv(path.parent)),
    "conversations": (".json", read_conversations),
    "data.json": (".json", lambda path: load_samples(str(path))),
    "data.jsonl": (".jsonl", lambda path: load_samples(str(path))),
}
EVERY_READER = pytest.mark.parametrize("name", READERS)
ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}]\n"
    for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


def refusal(name: str, folder: Path, content: str | bytes) -> str:
    suffix, read = READERS[name]
    path = folder / f"strange-0.5{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError) as caught:
        read(path)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 5000
    return said


# -- YAML and JSON -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (ALIASES, "anchors"),
        ("a: &a 1", "anchors"),
        ("a: &a [*a]", "anchors"),
        ("a: *b", "anchors"),
        ("<<: {a: 1}", "merge keys"),
        ("a: 1\nb: {c: 2, c: 3}", "the key 'c' is there twice"),
        ("a: !!python/object/apply:os.system ['true']", "the tag"),
        ("a: !!timestamp 2024-13-45", "the tag"),
        ("a: !!binary x", "the tag"),
        ("[" * (DEPTH + 2) + "]" * (DEPTH + 2), "nested more than"),
        ("[" * 100_000, "nest"),  # libyaml has a limit of its own
        ("- " * 100_000, "nested more than"),
        ("{a: " * 100_000, "nested more than"),
        ("a: " + "9" * 5000, "digits"),
        ("a: 0x" + "f" * 5000, "digits"),
        ("a: 1" + ":1" * 100_000, "digits"),
        ("a: -1" + ":1" * 100_000 + ".5", "digits"),
        ("a: \0", "not valid YAML"),
        ("a: 'b", "not valid YAML"),
        ("a: \x07", "not valid YAML"),
        ('a: "\\ud800"', "not valid YAML"),
        ("? [a]\n: 1", "not valid YAML"),
        ("a: 1\n---\nb: 1", "not valid YAML"),
    ],
    ids=lambda content: shown(content)[:24],
)
def test_yaml_that_is_more_than_plain_data_is_refused(content: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"it: .*is not valid YAML: ") as caught:
        parse_yaml(content, "it:")
    assert says in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"a": 1, "b": {"c": 2, "c": 3}}', "the key 'c' is there twice"),
        ("[" * (DEPTH + 2) + "]" * (DEPTH + 2), "nested more than"),
        ("[" * 100_000, "nested more than"),
        ('{"a":' * 100_000, "nested more than"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ('{"a": -' + "9" * (DIGITS + 1) + "}", "digits"),
        ('"\\ud800"', "half a surrogate pair"),
        ('{"\\udc00": 1}', "half a surrogate pair"),
        ("\0", "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
        ("", "not valid JSON"),
    ],
    ids=lambda content: shown(content)[:24],
)
def test_json_that_is_more_than_plain_data_is_refused(content: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"it: .*is not valid JSON: ") as caught:
        parse_json(content, "it:")
    assert says in str(caught.value) and len(str(caught.value)) < 500


def test_plain_data_are_read_as_they_stand() -> None:
    plain = {"a": [1, -2.5, None, True, "2024-13-45", "2024-01-01", "\U0001f600", "a\u2028b", "\0"], "b": {"c": {}}}
    assert parse_json(json.dumps(plain), "it") == parse_json(json.dumps(plain, ensure_ascii=False), "it") == plain
    assert parse_yaml("a: [1, -2.5, ~, yes, 2024-13-45, 2024-01-01, !!str 3, 0x10, .inf]\nb: {}", "it") == {
        "a": [1, -2.5, None, True, "2024-13-45", "2024-01-01", "3", 16, math.inf],
        "b": {},
    }
    deep: Any = []
    for _ in range(DEPTH - 1):
        deep = [deep]
    assert parse_json(json.dumps(deep), "it") == parse_yaml(json.dumps(deep), "it") == deep


@EVERY_READER
@pytest.mark.parametrize(
    "content",
    [
        "",
        "\0",
        b"\xff\xfe",
        "null",
        "3",
        '"text"',
        "[[]]",
        "[null]",
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        "9" * 5000,
        '{"budgets": "' + "\\ud800" + '"}',
        '{"budgets": [' + "9" * 300 + '], "retention": [[5]]}',
        '{"scorer": {"name": "' + "x" * 100_000 + '"}, "question": 3}',
        '{"self": 1, "budgets": 1}',
        '[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "image": [1]}]',
        '{"question": "q", "image": "../x.png"}',
        '{"question": "q", "image": 3}',
        '{"question": "q", "image": "a\\u0000b"}',
    ],
    ids=lambda content: shown(content)[:24],
)
def test_every_reader_refuses_what_it_cannot_use(tmp_path: Path, name: str, content: str | bytes) -> None:
    said = refusal(name, tmp_path, content)
    assert str(tmp_path) in said or "retention" in said  # the field, where an allocator reads a file that it can parse


@EVERY_READER
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "loop"])
def test_every_reader_refuses_what_is_no_file_and_waits_for_nothing(tmp_path: Path, name: str, kind: str) -> None:
    suffix, read = READERS[name]
    path = tmp_path / f"strange-0.5{suffix}"
    {
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
    }[kind]()
    with pytest.raises(ConfigError, match=r"cannot be read|neither a file"):
        read(path)


@pytest.mark.parametrize("name", [name for name in READERS if not name.startswith(("data", "conv"))])
def test_files_above_the_limit_are_refused_unread(tmp_path: Path, name: str) -> None:
    suffix, read = READERS[name]
    path = tmp_path / f"large-0.5{suffix}"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ConfigError, match=r"is larger than [0-9,]* bytes, the most that is read"):
        read(path)


def test_a_text_may_come_through_a_pipe_where_that_is_asked_for_and_only_up_to_the_limit(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"\xef\xbb\xbfpiped")
    os.close(writer)
    assert read_text(Path(f"/dev/fd/{reader}"), "prompt", pipes=True) == "piped"
    os.close(reader)
    with pytest.raises(ConfigError, match="is larger than 1,000 bytes"):
        read_text(Path("/dev/zero"), "prompt", 1000, pipes=True)
    with pytest.raises(ConfigError, match="no text in UTF-8"):
        (tmp_path / "a.txt").write_bytes(b"\xff")
        read_text(tmp_path / "a.txt", "prompt")


def test_lines_end_where_the_line_feed_is_and_nowhere_else(tmp_path: Path) -> None:
    asked = ["a\u2028b", "c\x85d", "e\x0bf\x1cg"]
    path = tmp_path / "questions.jsonl"
    path.write_text(
        "".join(json.dumps({"question": one}, ensure_ascii=False) + "\n" for one in asked), encoding="utf-8"
    )
    assert [sample.prompt for sample in load_samples(str(path))] == asked


def test_an_error_shows_little_of_a_large_value() -> None:
    shared: Any = "x"
    for _ in range(40):
        shared = [shared] * 9
    for value in (shared, "x" * 10**6, 1 << 10**6, list(range(10**5)), dict.fromkeys(map(str, range(10**5)), shared)):
        assert len(shown(value)) < 2000
        with pytest.raises(KVCompressError) as caught:
            CompressionConfig(scorer=value)
        assert len(str(caught.value)) < 4100
    assert len(str(ConfigError("x" * 10**6))) < 4100
    str(ConfigError("\ud800")).encode()
    assert shown("prefx") == "'prefx'" and shown(3) == "3" and shown(None) == "None"


# -- numbers -----------------------------------------------------------------------------------------------------------

LARGE = [2**31, -(2**31), 2**63, 10**30, 10**5000, 1e30, math.inf, "2147483648"]
FIELDS = [
    pytest.param(registry, name, field, id=f"{registry.stage}-{name}-{field}")
    for registry in REGISTRIES
    for name in registry.names()
    for field in registry.get(name).model_fields
]


@pytest.mark.parametrize(("registry", "name", "field"), FIELDS)
def test_no_field_of_any_policy_takes_a_number_of_two_to_the_31(registry: Any, name: str, field: str) -> None:
    for value in LARGE:
        for given in (value, [value], {1: value}):
            with pytest.raises(KVCompressError) as caught:
                registry.parse({"name": name, field: given})
            assert len(str(caught.value)) < 4100


@pytest.mark.parametrize("name", ["attention", "value_aware", "snapkv"])
def test_nor_does_a_short_way_to_set_one(name: str) -> None:
    for fields in ({"window": 2**31}, {"queries": f"window:{2**31}"}, {"queries": f"stride:{10**5}{10**400}"}):
        with pytest.raises(KVCompressError):
            CompressionConfig(scorer={"name": name, **fields})


@pytest.mark.parametrize("field", ["tokens", "sink", "recent"])
def test_no_field_of_a_budget_does_but_bytes(field: str) -> None:
    amount = {} if field == "tokens" else {"fraction": 0.5}
    for value in LARGE:
        with pytest.raises(KVCompressError):
            Budget(**{**amount, field: value})
    assert Budget(bytes="16GiB").bytes == 2**34 == Budget(bytes=2**34).bytes
    for large in (2**63, 10**5000, "9" * 30 + "B", "9" * 5000 + "GiB", 1e300):
        with pytest.raises(KVCompressError):
            Budget(bytes=large)


@pytest.mark.parametrize("field", LayerProfile.model_fields)
def test_no_field_of_a_profile_does_but_texts(field: str) -> None:
    for value in LARGE:
        if isinstance(value, str) and field in ("data", "data_hash", "version"):
            continue
        with pytest.raises(KVCompressError):
            LayerProfile(**{"budgets": [0.5], "retention": [[0.5]], field: value})


@pytest.mark.parametrize("key", ["self", "cls", "name", "given", 1, None, (1, 2), ""])
def test_a_field_of_any_name_is_refused_by_name(key: Any) -> None:
    for build in (
        lambda: CompressionConfig(scorer={"name": "attention", key: 1}),
        lambda: CompressionConfig(scorer="attention", budget={"fraction": 0.2, key: 1}),
        lambda: LayerProfile(budgets=[0.5], retention=[[0.5]], config={key: 1}),
    ):
        if key == "name":
            continue
        with pytest.raises(KVCompressError, match=r"unknown field|texts"):
            build()


# -- pictures ----------------------------------------------------------------------------------------------------------


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims to be of that size, in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", FORMATS)
def test_the_formats_that_the_documentation_names_are_read(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (8, 6), (200, 30, 30)).save(tmp_path / "picture", format=kind)
    picture = open_picture(tmp_path / "picture")
    assert picture.size == (8, 6) and picture.mode == "RGB"
    documented = (Path(__file__).parent.parent / "docs/security.md").read_text(encoding="utf-8")
    assert {"WEBP": "WebP"}.get(kind, kind) in documented


@pytest.mark.parametrize("kind", sorted({"EPS", "PPM", "TIFF", "ICO", "PCX", "TGA", "PDF"}))
def test_no_other_format_is_decoded(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png", format=kind)
    with pytest.raises(ConfigError, match=r"picture\.png: cannot be read: it is no picture in PNG, JPEG"):
        open_picture(tmp_path / "picture.png")


@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000)])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "bomb.png").write_bytes(png_of(*size))
    with pytest.raises(ConfigError, match=r"bomb\.png: has more than [0-9,]+ pixels, the most that is decoded"):
        open_picture(tmp_path / "bomb.png")


@pytest.mark.parametrize("kind", ["empty", "torn", "fifo", "folder", "device", "large", "missing", "loop", "NUL"])
def test_what_is_no_picture_is_refused_and_hashed_as_missing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a\0b" if kind == "NUL" else kind)
    if kind == "torn":
        Image.new("RGB", (64, 64), (1, 2, 3)).save(path, format="JPEG")
        path.write_bytes(path.read_bytes()[:400])
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(2**40)
    elif kind not in ("missing", "NUL"):
        {
            "empty": path.touch,
            "fifo": lambda: os.mkfifo(path),
            "folder": path.mkdir,
            "device": lambda: path.symlink_to("/dev/zero"),
            "loop": lambda: path.symlink_to(path),
        }[kind]()
    with pytest.raises(ConfigError, match="image"):
        open_picture(path)
    sample = Sample("a", "b", "c", path)
    if kind not in ("empty", "torn"):
        assert data_hash([sample]) == data_hash([Sample("a", "b", "c", tmp_path / "nothing")])


@pytest.mark.parametrize(
    "name", ["../x.png", "a/../../x.png", "/etc/passwd", "a/..", "..", "", "a\0b", 3, ["x.png"], {}]
)
def test_data_name_no_picture_out_of_its_folder(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ConfigError, match=r"it: (the image .* lies outside|an image is named by its path)"):
        picture_path(tmp_path / "images", name, "it")


def test_a_link_out_of_the_folder_of_pictures_is_refused_and_one_within_it_is_followed(tmp_path: Path) -> None:
    folder, secret = tmp_path / "images", tmp_path / "secret.png"
    folder.mkdir()
    for path in (secret, folder / "real.png"):
        Image.new("RGB", (8, 8)).save(path)
    (folder / "inside.png").symlink_to("real.png")
    (folder / "outside.png").symlink_to(secret)
    (folder / "above").symlink_to(tmp_path)
    lines = [{"question": "q", "image": name} for name in ("inside.png", "outside.png", "above/secret.png")]
    lines.append({"question": "q", "image": str(folder / "real.png")})
    (tmp_path / "questions.json").write_text(json.dumps(lines))
    (tmp_path / "link").symlink_to(folder)
    inside, outside, above, absolute = load_samples(str(tmp_path / "questions.json"), images=folder)
    assert inside.open_picture().size == absolute.open_picture().size == (8, 8)
    for sample in (outside, above):
        with pytest.raises(ConfigError, match="is a link out of its folder"):
            sample.open_picture()
    hashes = [data_hash([sample]) for sample in (outside, above)]
    secret.write_bytes(b"changed")
    assert hashes == [data_hash([sample]) for sample in (outside, above)]  # it was not read
    dialogue = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    (tmp_path / "dialogues.json").write_text(json.dumps([{**dialogue[0], "image": "outside.png"}]))
    (linked,) = load_samples(str(tmp_path / "dialogues.json"), images=tmp_path / "link")
    with pytest.raises(ConfigError, match="is a link out of its folder"):
        linked.open_picture()


# -- many entries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["same"], [""], ["a", "a#2"], ["same", "same#2", "same#3", "other"]])
def test_entries_of_one_id_are_named_apart_in_linear_time(names: list[str]) -> None:
    from kvcompress.evaluation.data.sample import with_unique_names

    def steps(count: int) -> int:
        samples, lines = [Sample(names[index % len(names)], "q", "a") for index in range(count)], 0

        def count_lines(frame: Any, event: str, _: Any) -> Any:
            nonlocal lines
            lines += event == "line" and frame.f_code is with_unique_names.__code__
            return count_lines

        before = sys.gettrace()
        sys.settrace(count_lines)
        try:
            found = with_unique_names(samples)
        finally:
            sys.settrace(before)
        assert len({sample.name for sample in found}) == count
        return lines

    assert steps(400) < 2.5 * steps(200)


def test_a_structure_is_read_by_its_ending(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("a: 1")
    (tmp_path / "a.json").write_text('\ufeff{"a": 1}', encoding="utf-8")
    assert read_structure(tmp_path / "a.yml", "it") == read_structure(tmp_path / "a.json", "it") == {"a": 1}
    with pytest.raises(ConfigError, match=r"must end in one of \.json, \.yaml, \.yml"):
        read_structure(tmp_path / "a.toml", "it")
