"""How the plugin speaks of mistakes in a user's settings."""


class UsageError(SystemExit):
    """Ends the command with one line on standard error, without a traceback: flag, value, remedy."""

    def __init__(self, message: str):
        super().__init__(f"fairseq-earm: error: {message}")
