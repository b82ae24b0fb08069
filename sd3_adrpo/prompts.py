"""Readers of prompt files: txt, csv, tsv, jsonl and json, as DrawBench, PartiPrompts, GenEval and HPDv2 come.

    .txt         one prompt a line
    .csv .tsv    a header with `prompt` or `prompts` (any case), optionally `category` and `negative_prompt`
    .jsonl       an object a line with `prompt`, optionally `negative_prompt`, `category` and `text` (what is to be
                 read in the image); GenEval's records too
    .json        a list of strings, or of such objects

Text is UTF-8, with or without a byte order mark. What makes a file unusable raises `PromptFileError`; blank lines and
duplicates are left out with a warning. Both name the lines. Python's standard library is all this needs.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .errors import UserError

PROMPTS_DIR = Path(__file__).parent.parent / "prompts"
MOST_HELD_OUT = 200  # prompts: measuring base and policy on more would take longer than many a run
MAX_CHARACTERS = 2000  # about 450 tokens; SD3's T5 reads at most 512, and longer lines are mostly not prompts at all
FORMATS = ".txt, .csv, .tsv, .jsonl or .json (prompts/README.md describes each)"


class PromptFileError(UserError, ValueError):
    """A prompt file that cannot be used; the message names the file, the line, what is allowed, and the remedy."""


@dataclass(frozen=True)
class Prompt:
    text: str
    category: str | None = None
    negative: str | None = None
    metadata: dict | None = field(default=None, hash=False)  # the whole record, where it has more: GenEval's, or a text


Rows = Iterator[tuple[int, Prompt]]  # line number from 1, and its prompt, whose text is empty for a blank line


def read_prompts(path: str | Path) -> list[Prompt]:
    """The file's prompts in their order, without blank ones and duplicates (equal up to white space)."""
    path = Path(path)
    try:
        data = _bytes(path)
        if path.suffix.lower() not in READERS:
            raise PromptFileError(f"the ending {path.suffix!r} is not known; allowed are {FORMATS}: rename the file")
        rows = list(READERS[path.suffix.lower()](_text(data)))
        _refuse_long(rows)
    except PromptFileError as error:
        raise PromptFileError(f"prompt file {path}: {error}") from None
    prompts, blank, duplicate = {}, [], []
    for line, prompt in rows:
        key = " ".join(prompt.text.split())
        if not key:
            blank.append(line)
        elif key in prompts:
            duplicate.append(line)
        else:
            prompts[key] = prompt
    if not prompts:
        raise PromptFileError(f"prompt file {path}: it has no prompts; write at least one (formats: {FORMATS})")
    for kind, lines in (("without a prompt", blank), ("with a prompt that stands further up", duplicate)):
        if lines:
            warnings.warn(f"prompt file {path}: left out what is {kind}: {_name_lines(lines)}", stacklevel=2)
    return list(prompts.values())


def file_hash(path: str | Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    return hashlib.sha256(_bytes(Path(path))).hexdigest()


def held_out(prompts: Sequence[Prompt], seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """(train, test): a fifth for the test, at most MOST_HELD_OUT, drawn by the seed; under ten, all are both."""
    if len(prompts) < 10:
        return list(prompts), list(prompts)
    chosen = set(random.Random(seed).sample(range(len(prompts)), min(len(prompts) // 5, MOST_HELD_OUT)))
    train = [prompt for index, prompt in enumerate(prompts) if index not in chosen]
    return train, [prompts[index] for index in sorted(chosen)]


def _bytes(path: Path) -> bytes:
    if path.is_dir():
        raise PromptFileError(f"this is a folder; give one file, {FORMATS}")
    if not path.exists():
        raise PromptFileError(f"no such file (looked from {Path.cwd()}); give the path of a file, {FORMATS}")
    return path.read_bytes()


def _text(data: bytes) -> str:
    """UTF-8 decoded, with `\\n` line ends."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise PromptFileError("line 1: this is UTF-16; only UTF-8 is allowed: save the file as UTF-8")
    data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise PromptFileError(
            f"line {line}: byte {error.object[error.start]:#04x} is not UTF-8, which alone is allowed: save the file "
            "as UTF-8 (an older Windows file: iconv -f WINDOWS-1252 -t UTF-8)"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise PromptFileError(f"line {line}: a zero byte; this is no text file in UTF-8: save it as UTF-8")
    if not text.strip():
        raise PromptFileError(f"it is empty; write at least one prompt (formats: {FORMATS})")
    return text.rstrip("\n")


def _refuse_long(rows: list[tuple[int, Prompt]]) -> None:
    long = [line for line, prompt in rows if len(prompt.text) > MAX_CHARACTERS]
    if long:
        longest = max(len(prompt.text) for _, prompt in rows)
        raise PromptFileError(
            f"{_name_lines(long)}: over-long, up to {longest} characters; {MAX_CHARACTERS} are allowed, more than any "
            "text encoder of SD3 reads: shorten or remove (is it a file of prompts?)"
        )


def _name_lines(lines: list[int], most: int = 10) -> str:
    """`line 3`, `lines 3, 5`; after ten of them `and 7 more`."""
    more = f" and {len(lines) - most} more" if len(lines) > most else ""
    return ("line " if len(lines) == 1 else "lines ") + ", ".join(map(str, lines[:most])) + more


def _read_txt(text: str) -> Rows:
    for line, prompt in enumerate(text.split("\n"), 1):
        yield line, Prompt(prompt.strip())


def _read_csv(text: str) -> Rows:
    return _table(list(_cells(text, delimiter=",", strict=True)), "Prompts,Category")


def _read_tsv(text: str) -> Rows:
    """Quotes enclose cells where the whole file reads so; else they are characters (PartiPrompts, line 1562)."""
    try:
        cells = list(_cells(text, delimiter="\t", strict=True))
    except PromptFileError:
        cells = list(_cells(text, delimiter="\t", quoting=csv.QUOTE_NONE))
    return _table(cells, "Prompt<tab>Category")


def _cells(text: str, **dialect) -> Iterator[tuple[int, list[str]]]:
    """Each row with the line it starts on: cells in quotes may hold line ends."""
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    line = 1
    try:
        for row in reader:
            yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise PromptFileError(
            f'line {line}: bad quotes ({error}); write a quote inside a quoted cell twice: "a sign that says ""Hi"""'
        ) from None


def _table(rows: list[tuple[int, list[str]]], example: str) -> Rows:
    rows = iter(rows)
    start, header = next((line, row) for line, row in rows if row)
    names = ["prompt" if cell.strip().lower() == "prompts" else cell.strip().lower() for cell in header]
    if "prompt" not in names:
        raise PromptFileError(
            f"line {start}: no prompt column in the header {header}; allowed are prompt, Prompt and Prompts, and "
            f"optionally Category and negative_prompt: make the first line {example!r}, or name a plain list .txt"
        )
    for line, row in rows:
        if any(cell.strip() for cell in row[len(names) :]):
            raise PromptFileError(
                f"line {line}: {len(row)} cells where the header has {len(names)}: "
                'put a prompt that holds the separator into quotes: "a cat, a dog"'
            )
        record = dict(zip(names, (cell.strip() for cell in row), strict=False))  # a row may be short
        text, category, negative = (record.get(name, "") for name in ("prompt", "category", "negative_prompt"))
        yield line, Prompt(text, category or None, negative or None)


def _read_jsonl(text: str) -> Rows:
    for line, entry in enumerate(text.split("\n"), 1):
        if not entry.strip():
            yield line, Prompt("")
            continue
        try:
            value = json.loads(entry)
        except json.JSONDecodeError as error:
            raise PromptFileError(
                f"line {line}: not JSON ({error.msg}, column {error.colno}); "
                'each line is an object: {"prompt": "..."}'
            ) from None
        yield line, _from_json(value, line)


def _read_json(text: str) -> Rows:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise PromptFileError(
            f"line {error.lineno}: not JSON ({error.msg}, column {error.colno}); allowed is one list: "
            '["...", "..."], or name a file with an object a line .jsonl'
        ) from None
    if not isinstance(values, list):
        raise PromptFileError(
            f"line 1: a {type(values).__name__}; allowed is a list of strings or of objects with a prompt"
        )
    decoder, position, line = json.JSONDecoder(), text.index("[") + 1, text.count("\n", 0, text.index("[")) + 1
    for value in values:  # a second pass, item by item, to know on which line each stands
        start = re.compile(r"[\s,]*").match(text, position).end()
        line += text.count("\n", position, start)
        yield line, _from_json(value, line)
        position = decoder.raw_decode(text, start)[1]
        line += text.count("\n", start, position)


def _from_json(value: object, line: int) -> Prompt:
    record = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(record, dict) or "prompt" not in record:
        found = f"an object with {sorted(record)}" if isinstance(record, dict) else f"a {type(value).__name__}"
        raise PromptFileError(f'line {line}: {found}; allowed is {{"prompt": "..."}} or a string: add the prompt')
    texts = [record["prompt"], record.get("category", record.get("tag")), record.get("negative_prompt")]
    for name, entry in zip(("prompt", "category", "negative_prompt"), texts, strict=True):
        if not isinstance(entry, str) and (entry is not None or name == "prompt"):
            raise PromptFileError(f"line {line}: {name} is {entry!r}; allowed is a string: put it into quotes")
    prompt, category, negative = (entry.strip() if entry else None for entry in texts)
    return Prompt(prompt or "", category or None, negative or None, record if record.keys() - KNOWN else None)


KNOWN = {"prompt", "category", "negative_prompt"}  # what has a field of its own

READERS: dict[str, Callable[[str], Rows]] = {
    ".txt": _read_txt,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
}
