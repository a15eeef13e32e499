"""How the plugin speaks of mistakes in a user's settings."""
PREFIX = "fairseq-earm: error: "


class UsageError(SystemExit):
    """Ends the command with one line on standard error, without a traceback: flag, value, remedy."""

    def __init__(self, message: str):
        super().__init__(f"{PREFIX}{message}")


def reason(error: BaseException) -> str:
    """What went wrong, to be put into another message: the first line of an error, or its kind where it says nothing."""
    said = str(error)
    said = said[len(PREFIX):] if said.startswith(PREFIX) else said
    return said.strip().split("\n")[0][:300] or type(error).__name__
