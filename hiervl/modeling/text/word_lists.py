"""Read the lists of words and texts that the config refers to: distractors, templates, definitions, class names."""

import os

import yaml

from ...errors import UserError


def read_lines(path: str, key: str) -> list[str]:
    """The lines of a text file, stripped, without empty lines and duplicates.

    Args:
        path: the file.
        key: the config key or option that names the file, for error messages.
    Raises:
        UserError: a missing, unreadable or empty file.
    """
    lines = [line.strip() for line in _read(path, key).splitlines()]
    words = list(dict.fromkeys(line for line in lines if line))
    if not words:
        raise UserError(f"{path}: the file is empty ({key}); it needs one entry per line.")
    return words


def read_templates(entries: tuple[str, ...]) -> list[str]:
    """Prompt templates, sentences with {} for the name. An entry without {} is the path of a file of templates."""
    templates = []
    for entry in entries:
        templates += [entry] if "{}" in entry else read_lines(entry, "MODEL.TEXT.TEMPLATES")
    return templates


def read_definitions(path: str) -> dict[str, list[str]]:
    """{class name: its texts} from a YAML file; empty if `path` is "".

    Raises:
        UserError: a missing or unreadable file, or one of another structure.
    """
    key = "MODEL.TEXT.DEFINITIONS"
    if not path:
        return {}
    try:
        content = yaml.safe_load(_read(path, key))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: invalid YAML ({key}): {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: {key} needs a line `name: [text, text, ...]` per class.")
    for name, texts in content.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{path}: {name!r} needs a list of texts, `{name}: [text, text, ...]` ({key}).")
    return {str(name): [text.strip() for text in texts] for name, texts in content.items()}


def read_classes(value: str) -> list[str]:
    """Class names from the command line: separated by commas, or a file with one name per line."""
    if os.path.isfile(value):
        return read_lines(value, "--classes")
    return [name.strip() for name in value.split(",") if name.strip()]


def _read(path, key):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'}; {key})."
        ) from None
