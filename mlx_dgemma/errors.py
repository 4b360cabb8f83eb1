"""The mistakes a user can make and mend: each message is one sentence, shown as it stands."""


class DgemmaError(Exception):
    """Base of every error below; the command line prints its message and exits with 1."""


class CheckpointError(DgemmaError):
    """A checkpoint is missing, broken, or of another kind."""


class OptionError(DgemmaError, TypeError, ValueError):
    """An option that does not exist, or a value outside its bounds."""


class PromptError(DgemmaError):
    """A prompt that cannot be encoded: empty, malformed, or longer than the context."""


class MemoryLimitError(DgemmaError):
    """The checkpoint needs more memory than this machine can give."""


class DataError(DgemmaError):
    """Training or evaluation data that cannot be read or used."""
