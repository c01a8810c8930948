"""Iterates over large arrays of a JSON file without loading the file into memory."""

import json
import reprlib
from collections.abc import Iterator, Mapping
from typing import BinaryIO

_READ_SIZE = 1 << 20  # bytes
_MAX_VALUE_SIZE = 1 << 28  # bytes of one JSON value


def top_level_items(path: str, names: Mapping[str, str]) -> Iterator[tuple[str, int, int, object]]:
    """Iterates over the arrays of a JSON file whose top level is an object, in constant memory.

    Args:
        path: of the file.
        names: {key of an array: what an item of it is called in messages}; values under other keys are skipped.

    Yields:
        (key, start, end, item) for every item of the arrays; its text is the bytes [start, end) of the file.

    Raises:
        ValueError: the file is not JSON, or a key is missing, appears twice, or is not an array.
        OSError: the file cannot be read.
        RecursionError: the file is nested too deeply.
    """
    missing = list(names)
    with open(path, "rb") as file:
        window = _Window(file)
        window.skip("{")
        while window.peek() != "}":
            key, start, _ = window.value()
            if not isinstance(key, str):
                raise ValueError(f"expected a key at byte {start}")
            window.skip(":")
            if key in names:
                if key not in missing:
                    raise ValueError(f"'{key}' appears twice")
                missing.remove(key)
                yield from ((key, *item) for item in _array_items(window, key, names[key]))
            else:
                window.value()
                window.refuse_literal(f"the value of {reprlib.repr(key)}")
            window.skip_comma("}")
        window.skip("}")
        window.expect_end()
    if missing:
        raise ValueError(f"it has no '{missing[0]}'")


def describe_item(key: str, name: str, start: int, item: object) -> str:
    """Identifies an array item in a message, by ``name`` and its id or else by its position in the file."""
    if isinstance(item, dict) and "id" in item:
        return f"{name} {reprlib.repr(item['id'])}"
    return f"the item of '{key}' at byte {start}"


def _array_items(window: "_Window", key: str, name: str) -> Iterator[tuple[int, int, object]]:
    """(start, end, item) for each item of the next array."""
    if window.peek() != "[":
        raise ValueError(f"'{key}' is not a list")
    window.skip("[")
    while window.peek() != "]":
        item, start, end = window.value()
        window.refuse_literal(describe_item(key, name, start, item))
        yield start, end, item
        window.skip_comma("]")
    window.skip("]")


class _Window:
    """The part of a file that is being parsed, decoded as Latin-1 so that character indices are byte offsets."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._text = file, ""
        self._position, self._offset = 0, 0  # the parser's position in the text, the text's offset in the file
        self._at_end = False  # whether the file has been read completely
        self._literals: list[str] = []  # NaN, Infinity and -Infinity in the last value
        self._decoder = json.JSONDecoder(parse_constant=self._literals.append)

    def peek(self) -> str:
        """The next character that is not whitespace, without consuming it."""
        while not self._skip_space():
            if self._at_end:
                raise ValueError("unexpected end of file")
            self._read_more()
        return self._text[self._position]

    def expect_end(self) -> None:
        while not self._skip_space():
            if self._at_end:
                return
            self._read_more()
        raise ValueError(f"expected the end of the file at byte {self._offset + self._position}")

    def skip(self, character: str) -> None:
        if self.peek() != character:
            raise ValueError(f"expected '{character}' at byte {self._offset + self._position}, found {self.peek()!r}")
        self._position += 1

    def skip_comma(self, closing: str) -> None:
        if self.peek() != closing:
            self.skip(",")
            if self.peek() == closing:
                raise ValueError(f"unexpected comma before the '{closing}' at byte {self._offset + self._position}")

    def value(self) -> tuple[object, int, int]:
        """Consumes the next JSON value; returns (value, start, end)."""
        self.peek()
        while True:
            self._literals.clear()
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
                # A number that touches the end of the window may continue after it.
                if end < len(self._text) or self._at_end:
                    break
            except json.JSONDecodeError as error:
                if self._at_end or len(self._text) - self._position > _MAX_VALUE_SIZE:
                    raise ValueError(f"{error.msg} at byte {self._offset + error.pos}") from None
            self._read_more()
        text = self._text[self._position : end]
        start, self._position = self._offset + self._position, end
        if not text.isascii():
            try:
                value = self._decoder.decode(text.encode("latin-1").decode())
            except UnicodeDecodeError as error:
                raise ValueError(f"byte {start + error.start} is not UTF-8") from None
        return value, start, self._offset + end

    def refuse_literal(self, description: str) -> None:
        """Raises ValueError if the last value contains NaN or Infinity; ``description`` names it in the message."""
        if self._literals:
            raise ValueError(f"{description}: {self._literals[0]} is not a valid JSON number")

    def _skip_space(self) -> bool:
        """Skips whitespace; returns whether anything else is left in the window."""
        while self._position < len(self._text) and self._text[self._position] in " \t\r\n":
            self._position += 1
        return self._position < len(self._text)

    def _read_more(self) -> None:
        """Drops the text already parsed and reads the next piece, at least as long as what is left of the window."""
        rest = self._text[self._position :]
        content = self._file.read(max(_READ_SIZE, len(rest)))
        self._at_end = not content
        self._text, self._offset, self._position = rest + content.decode("latin-1"), self._offset + self._position, 0
