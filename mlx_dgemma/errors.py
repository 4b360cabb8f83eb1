"""The mistakes a user can make and mend: each message is one sentence, shown as it stands."""

from __future__ import annotations

import reprlib


def human(nbytes: float) -> str:
    """Bytes in decimal units: 8.2 MB, 15.6 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes:.0f} bytes"


def count(number: int, noun: str) -> str:
    """1 block, 2 blocks."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def shown(value: object) -> str:
    """A value as an error names it: on one line, and short."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python prints no integer of more than some thousand digits
        return "an integer of thousands of digits"


INTERRUPTS = (KeyboardInterrupt, SystemExit, GeneratorExit)  # for whoever drives the loop, not for one request


def as_exception(error: BaseException) -> Exception:
    """An error that ends one request alone: a panic of a library in Rust is no Exception, and becomes one."""
    return error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")


def failure(rank: int, error: BaseException) -> str:
    """The sentence about a rank that an error has ended."""
    if isinstance(error, DgemmaError):
        return f"Rank {rank}: {error}"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"Rank {rank} has failed ({error.strerror}: {error.filename})."
    text = " ".join(str(error).split())
    return f"Rank {rank} has failed ({type(error).__name__}{f': {text}' if text else ''})."


class DgemmaError(Exception):
    """Base of every error below; the command line prints its message and exits with `exit_code`."""

    exit_code = 1


class CheckpointError(DgemmaError):
    """A checkpoint is missing, broken, or of another kind."""


class OptionError(DgemmaError, TypeError, ValueError):
    """An option that does not exist, or a value outside its bounds: wrong usage."""

    exit_code = 2


class CircumstanceError(OptionError):
    """An option that is right in itself and cannot be followed as things are: a target that exists, another system."""

    exit_code = 1


class LanguageError(DgemmaError):
    """A constrained text that would not be in its language: a fault of this package, so that nothing is handed out."""


class PromptError(DgemmaError):
    """A prompt that cannot be encoded: empty, malformed, or longer than the context."""


class MemoryLimitError(DgemmaError):
    """The checkpoint needs more memory than this machine can give."""


class RangeError(DgemmaError):
    """The model's states hold inf or NaN: its numbers left the range of their dtype, or its weights are broken."""


class DataError(DgemmaError):
    """Training or evaluation data that cannot be read or used."""
