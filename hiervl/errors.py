"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """A user's mistake: a missing file, a wrong key, data that does not fit.

    The message is one line that names the file or config key and the way out. ``train_net.py`` and the tools print
    it without a stack trace; everything else that goes wrong is our bug and keeps its trace.
    """
