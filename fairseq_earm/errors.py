"""How the plugin speaks of mistakes in a user's settings."""
import re

PREFIX = "fairseq-earm: error: "
# What moves a terminal's cursor, changes its colours or ends a line, for some programs or for all.
CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")


class UsageError(SystemExit):
    """Ends the command with one line on standard error, without a traceback: flag, value, remedy."""

    def __init__(self, message: str):
        super().__init__(f"{PREFIX}{one_line(message)}")


def one_line(text: str) -> str:
    """A text with its control characters as Python writes them, "\\n" for a line's end.

    Checkpoints, dictionaries and file names may hold any character: with a line's end they would forge a second
    message, and with an escape code overwrite the first.
    """
    return CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)


def reason(error: BaseException) -> str:
    """What went wrong, to be put into another message: the first line of an error, or its kind where it says nothing."""
    said = str(error)
    said = said[len(PREFIX):] if said.startswith(PREFIX) else said
    return one_line(said.strip().split("\n")[0])[:300] or type(error).__name__
