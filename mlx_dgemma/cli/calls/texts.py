"""Text from the command line and from files, checked to be UTF-8; what the system says of files, as a sentence."""

from __future__ import annotations

import os

from ...errors import PromptError


def decode_utf8(data: bytes, source: str) -> str:
    """Decode text unchanged, with any byte order mark and line ends. `source` names it in errors.

    Raises:
        PromptError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{source} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; "
            "convert it, for example with iconv."
        ) from None


def decode_argument(text: str | None, source: str) -> str | None:
    """Check text from the command line, where bytes that are not UTF-8 arrive as lone surrogates."""
    return text if text is None else decode_utf8(os.fsencode(text), source)


def sentence_of(error: OSError) -> str:
    """An error of the system in a sentence, with the file's name where it has one."""
    why = error.strerror or str(error)
    if error.filename is None:  # a stream
        return f"Input or output has failed ({why}); mend that and try again."
    return f"{os.fsdecode(error.filename)} cannot be used ({why}); mend that and try again."
