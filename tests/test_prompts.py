"""Every format of prompt files, every way in which one can be wrong, and the files that are shipped."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from pathlib import Path

import pytest

from sd3_adrpo.prompts import PROMPTS_DIR, Prompt, PromptFileError, file_hash, held_out, read_prompts

RECORD = {"tag": "counting", "include": [{"class": "lighthouse", "count": 2}], "prompt": "a photo of two lighthouses"}


@pytest.fixture
def write(tmp_path: Path):
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


@pytest.fixture
def read(write):
    """Writes and reads a file; any warning is an error."""

    def read_file(name: str, content: str | bytes) -> list[Prompt]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return read_prompts(write(name, content))

    return read_file


GOOD = {
    "txt": ("p.txt", "a cat\n  a dog, running \n", [Prompt("a cat"), Prompt("a dog, running")]),
    "no last line end": ("p.txt", "a cat\na dog", [Prompt("a cat"), Prompt("a dog")]),
    "Windows line ends": ("p.txt", "a cat\r\na dog\r\n", [Prompt("a cat"), Prompt("a dog")]),
    "old Mac line ends": ("p.txt", "a cat\ra dog\r", [Prompt("a cat"), Prompt("a dog")]),
    "byte order mark": ("p.txt", "\ufeffKäse\n", [Prompt("Käse")]),
    "line separator within a prompt": ("p.txt", "a\u2028cat\n", [Prompt("a\u2028cat")]),
    "capital ending": ("P.TXT", "a cat\n", [Prompt("a cat")]),
    "DrawBench": (
        "p.csv",
        'Prompts,Category\nA red car.,Colors\n"A cat, a dog",Gary Marcus et al.\n',
        [Prompt("A red car.", "Colors"), Prompt("A cat, a dog", "Gary Marcus et al.")],
    ),
    "csv with a byte order mark": ("p.csv", "\ufeffPrompts,Category\na cat,x\n", [Prompt("a cat", "x")]),
    "csv with quotes and line ends in a cell": (
        "p.csv",
        'Prompts,Category\n"a sign\nthat says ""Hi""",Text\n',
        [Prompt('a sign\nthat says "Hi"', "Text")],
    ),
    "csv with prompt alone": ("p.csv", "prompt\na cat\n", [Prompt("a cat")]),
    "csv with a negative prompt and a further column": (
        "p.csv",
        "id,negative_prompt,prompt\n7,blurry,a cat\n8,,a dog\n",
        [Prompt("a cat", None, "blurry"), Prompt("a dog")],
    ),
    "csv with empty cells at the end": (
        "p.csv",
        "Prompts,Category\na cat,x,,\na dog\n",
        [Prompt("a cat", "x"), Prompt("a dog")],
    ),
    "PartiPrompts": (
        "p.tsv",
        "Prompt\tCategory\tChallenge\tNote\n"
        'time\tAbstract\tBasic\tOne, two\n"OPEN" above a door.\tIllustrations\tWriting\t\n',
        [Prompt("time", "Abstract"), Prompt('"OPEN" above a door.', "Illustrations")],
    ),
    "tsv with quoted cells": ("p.tsv", 'Prompts\tCategory\n"a\tcat"\tx\n', [Prompt("a\tcat", "x")]),
    "jsonl": (
        "p.jsonl",
        '{"prompt": "a cat", "negative_prompt": "blurry", "category": "x"}\n{"prompt": "ein Bär"}\n',
        [Prompt("a cat", "x", "blurry"), Prompt("ein Bär")],
    ),
    "GenEval": (
        "p.jsonl",
        json.dumps(RECORD) + "\n",
        [Prompt("a photo of two lighthouses", "counting", None, RECORD)],
    ),
    "HPDv2, benchmark": ("p.json", '["a cat", "a [dog], \\"x\\""]', [Prompt("a cat"), Prompt('a [dog], "x"')]),
    "HPDv2, training": (
        "p.json",
        '[{"prompt": "a cat", "image_path": ["1.jpg"]}]',
        [Prompt("a cat", metadata={"prompt": "a cat", "image_path": ["1.jpg"]})],
    ),
}


@pytest.mark.parametrize("name, content, expected", GOOD.values(), ids=GOOD)
def test_formats(read, name: str, content: str, expected: list[Prompt]):
    assert read(name, content) == expected


LATIN = "a cat\nein B\xe4r\n".encode("latin-1")
LONG = "x" * 2001
BAD = {
    "bad byte": ("p.txt", LATIN, "line 2: byte 0xe4 is not UTF-8", "WINDOWS-1252"),
    "bad byte after Mac line ends": (
        "p.txt",
        LATIN.replace(b"\n", b"\r"),
        "line 2: byte 0xe4",
        "save the file as UTF-8",
    ),
    "bad byte after a byte order mark": ("p.csv", b"\xef\xbb\xbfPrompts\na\n\xff\n", "line 3: byte 0xff", "save"),
    "UTF-16": ("p.csv", "Prompts\na cat\n".encode("utf-16"), "line 1: this is UTF-16", "save the file as UTF-8"),
    "UTF-16 without a mark": ("p.txt", "a\n".encode("utf-16-le"), "line 1: a zero byte", "save it as UTF-8"),
    "zero byte": ("p.txt", b"a\nb\0\n", "line 2: a zero byte", "save it as UTF-8"),
    "empty": ("p.txt", "", "it is empty", "write at least one prompt"),
    "white space only": ("p.txt", " \n\n", "it is empty", "write at least one prompt"),
    "header only": ("p.csv", "Prompts,Category\n", "it has no prompts", "write at least one"),
    "empty list": ("p.json", "[]", "it has no prompts", "write at least one"),
    "unknown ending": ("p.xlsx", "a", "the ending '.xlsx' is not known", "rename the file"),
    "no prompt column": (
        "p.csv",
        "\ntext,Category\na,b\n",
        "line 2: no prompt column in the header ['text'",
        "Prompts,Category",
    ),
    "comma without quotes": (
        "p.csv",
        "Prompts,Category\na,b\na cat, a dog,x\n",
        "line 3: 3 cells where the header has 2",
        "quotes",
    ),
    "open quote": ("p.csv", 'Prompts\na\n"b\nc\n', "line 3: bad quotes", "twice"),
    "stray quote": ("p.csv", 'Prompts\n"a "b" c"\n', "line 2: bad quotes", "twice"),
    "over-long": ("p.txt", f"a\n{LONG}\nb\n{LONG}\n", "lines 2, 4: over-long, up to 2001 characters; 2000", "shorten"),
    "over-long after a cell of two lines": ("p.csv", f'Prompts\n"a\nb"\n{LONG}\n', "line 4: over-long", "shorten"),
    "jsonl, not JSON": ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": a}\n', "line 3: not JSON", "each line is an object"),
    "jsonl, no prompt": (
        "p.jsonl",
        '{"prompt": "a"}\n{"text": "b"}\n',
        "line 2: an object with ['text']",
        "add the prompt",
    ),
    "jsonl, a number": ("p.jsonl", "7\n", "line 1: a int", "add the prompt"),
    "jsonl, prompt is null": ("p.jsonl", '{"prompt": null}\n', "line 1: prompt is None", "allowed is a string"),
    "jsonl, category is a number": ("p.jsonl", '{"prompt": "a", "category": 3}\n', "line 1: category is 3", "a string"),
    "json, not JSON": ("p.json", '["a",\n "b"\n "c"]', "line 3: not JSON", ".jsonl"),
    "json, an object": ("p.json", '{"prompt": "a"}', "line 1: a dict", "a list of strings"),
    "json, no prompt": (
        "p.json",
        '[\n\n{"prompt":\n"a"},\n\n{"text": "b"}]',
        "line 6: an object with ['text']",
        "add the prompt",
    ),
    "json, over-long": ("p.json", json.dumps(["a", LONG], indent=1), "line 3: over-long", "shorten"),
}


@pytest.mark.parametrize("name, content, problem, remedy", BAD.values(), ids=BAD)
def test_errors_name_file_line_and_remedy(write, name: str, content: str | bytes, problem: str, remedy: str):
    path = write(name, content)
    with pytest.raises(PromptFileError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert message.startswith(f"prompt file {path}: {problem}")
    assert remedy in message


def test_missing_file_and_folder(tmp_path: Path):
    with pytest.raises(PromptFileError, match=r"no such file.*\.txt, \.csv, \.tsv, \.jsonl or \.json"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(PromptFileError, match="a folder; give one file"):
        read_prompts(tmp_path)


def test_longest_allowed(read):
    assert read("p.txt", "x" * 2000) == [Prompt("x" * 2000)]


WARNED = {
    "txt": ("p.txt", "\na\n\nb\na \n", "lines 1, 3", "line 5"),
    "csv": ("p.csv", 'Prompts,Category\n"a\nx",1\n,2\n\nb,3\n"a  x",4\n', "lines 4, 5", "line 7"),
    "jsonl": (
        "p.jsonl",
        '{"prompt": "a"}\n\n{"prompt": " "}\n{"prompt": "b"}\n{"prompt": "a"}\n',
        "lines 2, 3",
        "line 5",
    ),
    "json": ("p.json", '["a",\n"",\n\n"b", "",\n"a"]', "lines 2, 4", "line 5"),
}


@pytest.mark.parametrize("name, content, blank, duplicate", WARNED.values(), ids=WARNED)
def test_blank_and_duplicate_lines_are_left_out_with_a_warning(write, name, content, blank, duplicate):
    with pytest.warns(UserWarning) as caught:
        prompts = read_prompts(write(name, content))
    assert [" ".join(prompt.text.split())[0] for prompt in prompts] == ["a", "b"]
    assert len(prompts) == 2
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert messages[0].endswith(f"without a prompt: {blank}")
    assert messages[1].endswith(f"further up: {duplicate}")


def test_first_of_duplicates_stays_and_many_lines_are_counted(write):
    path = write("p.csv", "Prompts,Category\n" + "".join(f"a,{index}\n" for index in range(14)))
    with pytest.warns(UserWarning, match=r"lines 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 3 more$"):
        assert read_prompts(path) == [Prompt("a", "0")]


def test_file_hash(write):
    assert file_hash(write("p.txt", "abc")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_hash(write("q.txt", "a\r\n")) == hashlib.sha256(b"a\r\n").hexdigest()
    with pytest.raises(PromptFileError, match="no such file"):
        file_hash(write("p.txt", "abc").with_name("none.txt"))


@pytest.mark.parametrize("count, test_count", [(10, 2), (11, 2), (15, 3), (100, 20), (999, 199), (5000, 200)])
def test_held_out_fifth(count: int, test_count: int):
    prompts = [Prompt(f"{index:04}") for index in range(count)]
    train, test = held_out(prompts, seed=3)
    assert len(test) == test_count
    assert sorted(train + test, key=lambda prompt: prompt.text) == prompts
    assert train == sorted(train, key=lambda prompt: prompt.text)
    assert held_out(prompts, seed=3) == (train, test)
    assert any(held_out(prompts, seed=seed)[1] != test for seed in range(4, 9))


def test_held_out_of_few():
    prompts = [Prompt(str(index)) for index in range(9)]
    assert held_out(prompts, seed=0) == (prompts, prompts)


@pytest.mark.parametrize("name, count", [("drawbench_style.csv", 110), ("raft_style.txt", 60)])
def test_shipped_general_prompts(name: str, count: int):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts = read_prompts(PROMPTS_DIR / name)
    assert len(prompts) == count


def test_shipped_drawbench_style_has_all_categories():
    names = "Colors,Conflicting,Counting,DALL-E,Descriptions,Gary Marcus et al."
    names += ",Misspellings,Positional,Rare Words,Reddit,Text"
    prompts = read_prompts(PROMPTS_DIR / "drawbench_style.csv")
    assert Counter(prompt.category for prompt in prompts) == {name: 10 for name in names.split(",")}


def test_every_shipped_file_is_described():
    readme = (PROMPTS_DIR / "README.md").read_text(encoding="utf-8")
    for path in PROMPTS_DIR.iterdir():
        assert path.name == "README.md" or f"`{path.name}`" in readme
