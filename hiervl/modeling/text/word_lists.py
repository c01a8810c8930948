"""Lists of words and texts that the config names: distractors, templates, definitions."""

import os

import yaml

from ...errors import UserError


def read_lines(path: str, key: str) -> list[str]:
    """The lines of a text file without blanks and repetitions.

    Raises:
        UserError: no such file, or nothing in it.
    """
    words = list(dict.fromkeys(line.strip() for line in _read(path, key).splitlines() if line.strip()))
    if not words:
        raise UserError(f"{path}: is empty ({key}); it needs one entry per line.")
    return words


def read_templates(entries: tuple[str, ...]) -> list[str]:
    """Sentences with {} for the name; an entry without {} is a file of them."""
    key = "MODEL.TEXT.TEMPLATES"
    return [line for entry in entries for line in ([entry] if "{}" in entry else read_lines(entry, key))]


def read_definitions(path: str) -> dict[str, list[str]]:
    """{class name: its texts} of a YAML file; {} for "".

    Raises:
        UserError: no such file, or another structure.
    """
    key = "MODEL.TEXT.DEFINITIONS"
    if not path:
        return {}
    try:
        content = yaml.safe_load(_read(path, key))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({key}): {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: {key} needs a line `name: [text, text, ...]` per class.")
    for name, texts in content.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{path}: {name!r} needs a list of texts, `{name}: [text, text, ...]` ({key}).")
    return {str(name): [text.strip() for text in texts] for name, texts in content.items()}


def read_classes(given: str) -> list[str]:
    """Class names as the command line gives them: separated by commas, or a file with one per line."""
    if os.path.isfile(given):
        return read_lines(given, "--classes")
    return [name.strip() for name in given.split(",") if name.strip()]


def _read(path, key):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'}; {key})."
        ) from None
