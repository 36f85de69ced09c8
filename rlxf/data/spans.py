"""Rows of a JSON list and of a CSV file, read from disk on request: what stays in memory is 16 bytes per row."""

from __future__ import annotations

import codecs
import csv
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from rlxf.core.errors import DataError
from rlxf.core.jsonl import MAX_LINE_BYTES, Check, Row, RowProblems, describe

_BOM = b"\xef\xbb\xbf"
_CHUNK_BYTES = 2**18


class Span(NamedTuple):
    """One row found in a file."""

    start: int  # byte offset
    num_bytes: int
    line: int  # on which it starts, from 1
    parsed: Row | str  # the row, or what is wrong with it


class _Spans:
    """Rows that each lie in one stretch of bytes."""

    def __init__(self, path: Path, check: Check, problems: RowProblems) -> None:
        self.path = path
        self.columns: tuple[str, ...] = ()
        self.bad: dict[int, str] = {}
        self._starts, self._sizes, self._lines = array("q"), array("i"), array("i")
        columns = dict[str, None]()
        with path.open("rb") as handle:
            for span in self._scan(handle):
                reason = span.parsed if isinstance(span.parsed, str) else check(span.parsed)
                if reason and problems.add(f"{path}:{span.line}", reason):
                    self.bad[len(self)] = reason
                if isinstance(span.parsed, dict):
                    columns.update(dict.fromkeys(span.parsed))
                self._starts.append(span.start)
                self._sizes.append(span.num_bytes)
                self._lines.append(span.line)
        self.columns = tuple(columns)
        problems.raise_any(len(self))
        if not len(self):
            raise DataError(f"{path}: holds no rows")

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, row: int) -> str:
        """``file:line`` of a row, for messages."""
        return f"{self.path}:{self._lines[row]}"

    def __getitem__(self, row: int) -> Row:
        with self.path.open("rb") as handle:
            handle.seek(self._starts[row])
            parsed = self._parse(handle.read(self._sizes[row]))
        if isinstance(parsed, str):
            raise DataError(f"{self.where(row)}: the file changed while the run was reading it: {parsed}")
        return parsed

    def _scan(self, handle: BinaryIO) -> Iterator[Span]:
        raise NotImplementedError

    def _parse(self, content: bytes) -> Row | str:
        raise NotImplementedError


class JsonList(_Spans):
    """The objects of one JSON list. If a list is broken, the rows after the break cannot be read: it is refused."""

    def _scan(self, handle: BinaryIO) -> Iterator[Span]:
        text = _Window(handle, self.path)
        text.skip("[")
        more = text.peek() != "]"
        while more:
            text.peek()
            line, start = text.line, text.offset
            value, source = text.value()
            yield Span(start, text.offset - start, line, _object(value, source))
            if more := text.peek() != "]":
                text.skip(",")
        text.skip("]")
        if end := text.peek():
            raise DataError(f"{self.path}:{text.line}: {end!r} after the end of the list; expected one list per file")

    def _parse(self, content: bytes) -> Row | str:
        try:
            text = content.decode("utf-8")
            return _object(json.loads(text), text)
        except ValueError as error:
            return str(error)


def _object(value: object, source: str) -> Row | str:
    if not isinstance(value, dict):
        return f"expected a JSON object, got {describe(value)}"
    return _encoding_problem(source) or value


def _encoding_problem(text: str) -> str | None:
    """What is wrong with a text that was decoded with ``surrogateescape``."""
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"not UTF-8: byte 0x{ord(text[error.start]) & 0xFF:02x}; save the file as UTF-8"
    return None


class _Window:
    """The text of a JSON file from where it is read, a chunk at a time; knows byte and line of the next character."""

    def __init__(self, handle: BinaryIO, path: Path) -> None:
        self._handle = handle
        self._path = path
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._text, self._next, self._at_end = "", 0, False
        self._parser = json.JSONDecoder()
        self.offset, self.line = 0, 1
        if handle.read(len(_BOM)) == _BOM:
            self.offset = len(_BOM)
        else:
            handle.seek(0)

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            text, end = self._text, self._next
            while end < len(text) and text[end] in " \t\r\n":
                end += 1
            self._advance(end)
            if end < len(text) or not self._read():
                return self._text[self._next : self._next + 1]

    def skip(self, expected: str) -> None:
        found = self.peek()
        if found != expected:
            got = repr(found) if found else "the end of the file"
            raise DataError(f"{self._path}:{self.line}: not a JSON list: expected {expected!r}, got {got}")
        self._advance(self._next + 1)

    def value(self) -> tuple[object, str]:
        """The JSON value that starts here, and its source."""
        while True:
            try:
                value, end = self._parser.raw_decode(self._text, self._next)
            except (ValueError, RecursionError) as error:
                if len(self._text) - self._next <= MAX_LINE_BYTES and self._read():
                    continue
                reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                rest = "the rest of the list cannot be read"
                raise DataError(f"{self._path}:{self.line}: not JSON in this row: {reason}; {rest}") from error
            source = self._text[self._next : end]
            self._advance(end)
            return value, source

    def _advance(self, end: int) -> None:
        passed = self._text[self._next : end]
        self.offset += len(passed) if passed.isascii() else len(passed.encode("utf-8", "surrogateescape"))
        self.line += passed.count("\n")
        self._next = end

    def _read(self) -> bool:
        """Read more of the file behind the text that is left; False if there was no more."""
        if self._at_end:
            return False
        content = self._handle.read(max(_CHUNK_BYTES, len(self._text) - self._next))
        self._at_end = not content
        self._text = self._text[self._next :] + self._decode(content, self._at_end)
        self._next = 0
        return True


class CsvRows(_Spans):
    """The records of a CSV file with commas, quotes doubled within quotes, and the columns' names in its first record.

    Every value is a string: a column of numbers stays text.
    """

    def _scan(self, handle: BinaryIO) -> Iterator[Span]:
        lines = _Lines(handle)
        records = _records(lines)
        self._header = self._checked_header(next(records, None))
        while True:
            start, line = lines.offset, lines.number + 1
            record = next(records, None)
            if record is None:
                return
            if record:
                yield Span(start, lines.offset - start, line, self._row(record))

    def _parse(self, content: bytes) -> Row | str:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            return str(error)
        return self._row(next(_records(iter([text])), ""))

    def _row(self, record: list[str] | str) -> Row | str:
        if isinstance(record, str):
            return record
        if len(record) != len(self._header):
            return f"{len(record)} values, but the first line names {len(self._header)} columns"
        return _encoding_problem("".join(record)) or dict(zip(self._header, record, strict=True))

    def _checked_header(self, record: list[str] | str | None) -> list[str]:
        if not record:
            raise DataError(f"{self.path}: holds no rows; expected the columns' names in the first line")
        problem = record if isinstance(record, str) else _encoding_problem("".join(record))
        if problem:
            raise DataError(f"{self.path}:1: the columns' names: {problem}")
        twice = sorted({name for name in record if record.count(name) > 1})
        if twice:
            raise DataError(f"{self.path}:1: names column {twice[0]!r} twice")
        return list(record)


class _Lines:
    """Lines of a file, as text; knows how many bytes and lines were handed out."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        if handle.read(len(_BOM)) != _BOM:
            handle.seek(0)
        self.offset, self.number = handle.tell(), 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._handle.readline(MAX_LINE_BYTES)
        if not line:
            raise StopIteration
        self.offset += len(line)
        self.number += line.endswith(b"\n")
        return line.decode("utf-8", "surrogateescape")


def _records(lines: Iterator[str]) -> Iterator[list[str] | str]:
    """The records of CSV lines, or what is wrong with them."""
    csv.field_size_limit(MAX_LINE_BYTES)  # the library's own limit is 128 KiB, for all of its readers
    reader = csv.reader(lines, strict=True)
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"not CSV: {error}"
