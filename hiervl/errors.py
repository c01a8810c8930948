"""The one exception for mistakes that a user can mend, and how the tools tell it."""

import sys


class UserError(Exception):
    """A user's mistake: a missing file, a wrong key, data that does not fit.

    The message is one line that names the file or config key and the way out. ``train_net.py`` and the tools print
    it without a stack trace; everything else that goes wrong is our bug and keeps its trace.
    """


def exit_status(run, *arguments) -> int:
    """Call run(*arguments): 0, or 2 after a user's mistake, which is reported in one line."""
    try:
        run(*arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check_choice(value, choices, key: str) -> None:
    """Raise UserError unless `value` is one of `choices`; `key` is the config key or option that was set."""
    if value not in choices:
        raise UserError(f"{key}: {value!r} is not one of {', '.join(choices)}.")
