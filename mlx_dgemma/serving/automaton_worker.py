"""The process that makes automata for `automata`: it reads jobs from a pipe and answers with languages or errors."""

from __future__ import annotations

import os
import pickle
import sys
import time
from contextlib import suppress
from io import BytesIO
from multiprocessing.connection import Connection
from typing import Any

from ..constraints.tokens import TokenBytes
from ..errors import OptionError
from ..prompt.lanes import make_language

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# Run with the pipe's file descriptor and sys.path as arguments.
COMMAND = "import sys; sys.path[:] = sys.argv[2:]; from mlx_dgemma.serving.automaton_worker import main; main()"
MEMORY_BYTES = 2**32  # of addresses; an automaton of the largest allowed size takes a small part of it
NICENESS = 5  # more would starve them on a busy machine, and threads while they hold the interpreter


class Pickler(pickle.Pickler):
    """Leaves out the tokenizer's bytes, which both sides have."""

    def persistent_id(self, value: Any) -> str | None:
        """A name for what is left out."""
        return "token_bytes" if isinstance(value, TokenBytes) else None


class Unpickler(pickle.Unpickler):
    """Puts the tokenizer's bytes back."""

    def __init__(self, file: BytesIO, token_bytes: TokenBytes):
        super().__init__(file)
        self._token_bytes = token_bytes

    def persistent_load(self, name: Any) -> TokenBytes:
        """What such a name stands for."""
        return self._token_bytes


def main() -> None:
    """Serve the parent until it closes the pipe."""
    connection = Connection(int(sys.argv[1]))
    with suppress(OSError):
        os.nice(NICENESS)  # steps come first
    if resource is not None:
        with suppress(OSError, ValueError):  # macOS has no such limit
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    token_bytes: TokenBytes | None = None
    with suppress(EOFError, OSError):  # the parent has ended
        while True:
            message = pickle.loads(connection.recv_bytes())
            if isinstance(message, TokenBytes):
                token_bytes = message
                continue
            assert token_bytes is not None
            connection.send_bytes(answer(message, token_bytes))


def answer(job: tuple[str, Any, str, int], token_bytes: TokenBytes) -> bytes:
    """A pickle of a language, or of the exception that making it raised.

    Args:
        job: kind, source and name, as `prompt.lanes.make_language` takes them, and seconds of processor time, after
            which the process is ended.
        token_bytes: of the tokenizer.
    """
    kind, source, what, seconds = job
    if resource is not None:
        limit = int(time.process_time()) + seconds + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    made: Any
    try:
        made = make_language(kind, source, token_bytes, what)
    except MemoryError:
        made = OptionError(f"{what} takes too much memory to prepare; ask for smaller bounds (maxLength, {{m,n}}).")
    except Exception as error:
        made = error
    file = BytesIO()
    try:
        Pickler(file).dump(made)
    except (pickle.PicklingError, TypeError, AttributeError):  # an exception that holds what cannot be sent
        return pickle.dumps(RuntimeError(f"{type(made).__name__}: {made}"))
    return file.getvalue()
