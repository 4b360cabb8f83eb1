"""Commands that let a running server on this machine do the work: the client of `server.local`.

It imports neither click nor typing nor what is heavier, so that a call costs milliseconds. Of HTTP it needs little: a
request of HTTP/1.0 is answered without chunks, and the end of the connection ends the answer.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from types import SimpleNamespace

from .. import __version__
from ..errors import DgemmaError, OptionError
from ..serving.rendezvous import VERSION_HEADER, check_owner, socket_path

TYPE_CHECKING = False  # as typing's
if TYPE_CHECKING:
    from typing import Any, BinaryIO

    from .terminal import Terminal

HEALTH_SECONDS = 2.0  # that a server gets to tell how it is; one that loads its model does not answer


class SeenDraft:
    """A canvas after one denoising step, as it was read: `pieces` are those of `uncertain_text`."""

    def __init__(self, block: int, step: int, pieces: list[tuple[str, float]]):
        self.block, self.step, self.pieces = block, step, pieces


class SeenBlock:
    """The text and the thinking that are new and final."""

    def __init__(self, text: str, thinking: str):
        self.text, self.thinking = text, thinking


class SeenEnd:
    """The end of an answer: a `Result`, or something with its attributes."""

    def __init__(self, result: Any):
        self.result = result


class Refused(DgemmaError):
    """What the server answers in place of events.

    Attributes:
        code: a short name, such as "version" or, for wrong usage of a command, "usage".
    """

    def __init__(self, message: str, code: str | None = None):
        super().__init__(message)
        self.code = code
        if code == "usage":
            self.exit_code = OptionError.exit_code


class Gone(DgemmaError):
    """The server has ended the connection."""


class Remote:
    """A server that has loaded what a command needs. It answers as an `Engine` would.

    Attributes:
        notes: what was chosen while the server loaded the model.
        options: all that are in force for the last request.
        accepted: called once a request is found right.
    """

    def __init__(self, path: str, notes: Sequence[str]):
        self._path, self.notes = path, tuple(notes)
        self.options: dict[str, Any] = {}
        self.accepted: Callable[[], None] = lambda: None

    def stream(self, messages: list[dict[str, Any]], *, drafts: bool = True, **keywords: Any) -> Iterator[Any]:
        """Answer a prompt, event by event, as `Engine.stream` does."""
        return self.task("generate", [messages], keywords, drafts)

    def task(self, name: str, arguments: list[Any], keywords: dict[str, Any], drafts: bool) -> Iterator[Any]:
        """The events of a task: `SeenDraft`, `SeenBlock`, and `SeenEnd` with the result.

        Closing the iterator cancels the request, and so does the end of this process.

        Raises:
            DgemmaError: the sentence that the server tells.
        """
        given = [_with_files(one) if isinstance(one, list) else one for one in arguments]
        body = {"arguments": given, "keywords": keywords, "drafts": drafts}
        with closing(self._lines(name, body)) as lines:
            for line in lines:
                if "draft" in line:
                    yield SeenDraft(**line["draft"])
                elif "block" in line:
                    yield SeenBlock(**line["block"])
                elif "result" in line:
                    result = line["result"]
                    yield SeenEnd(SimpleNamespace(**{**result, "stats": SimpleNamespace(**result["stats"])}))
                    return
        raise Gone("The server ended before the answer did; ask again.")

    def choose(self, messages: list[dict[str, Any]], labels: Any, **keywords: Any) -> dict[str, Any]:
        """The fields of `tasks.choose.Choice`."""
        kind = "range" if isinstance(labels, range) else "bool" if labels is bool else "texts"
        values = [labels.start, labels.stop] if isinstance(labels, range) else None if labels is bool else labels
        body = {"arguments": [_with_files(messages), [kind, values]], "keywords": keywords}
        for line in self._lines("choose", body):
            if "choice" in line:
                found = {name: dict(pairs) for name, pairs in line["choice"]["probabilities"]}
                return {**line["choice"], "probabilities": found if isinstance(labels, dict) else found[""]}
        raise Gone("The server ended before the answer did; ask again.")

    def _lines(self, task: str, body: dict[str, Any]) -> Generator[dict[str, Any]]:
        """What the server tells, a line at a time; its warnings are this process's."""
        try:
            asked = _asked(self._path, "POST", f"/local/{task}", json.dumps(body).encode())
        except (ConnectionRefusedError, FileNotFoundError):
            return
        with closing(asked) as answer:
            for i, text in enumerate(answer):
                if not text.endswith(b"\n"):  # the server was killed
                    return
                line = json.loads(text)
                if "error" in line:
                    raise _refusal(line)
                if i == 0:
                    self.accepted()
                if "accepted" in line:
                    options = line["accepted"]["options"].items()
                    self.options = {name: tuple(one) if isinstance(one, list) else one for name, one in options}
                for message in line.get("warnings", line.get("accepted", {}).get("warnings", ())):
                    warnings.warn(message, stacklevel=2)
                yield line


def find_server(wanted: str, terminal: Terminal) -> Remote | None:
    """The server on this machine that has loaded what `rendezvous.identity` names, or None.

    Where there is one that must not be used, or cannot be, a line on stderr tells why.
    """
    path = socket_path(wanted)
    try:
        if not check_owner(path):
            return None
        with closing(_asked(path, "GET", "/local")) as answer:
            told = json.load(answer)
    except (ConnectionRefusedError, FileNotFoundError):  # a stale socket, which the next server replaces
        return None
    except OSError as error:
        terminal.warn(f"The server of this machine is not used: {path}: {error.strerror}. The model is loaded here.")
        return None
    except (OptionError, Refused, Gone) as error:
        terminal.warn(f"The server of this machine is not used: {error} The model is loaded here instead.")
        return None
    return Remote(path, told["notes"]) if told["identity"] == wanted else None


def seen_events(engine: Any, events: Iterator[Any]) -> Iterator[Any]:
    """The events as `Remote` tells them, so that nothing heavy is imported where a server does the work."""
    if isinstance(engine, Remote):
        yield from events
        return
    from ..decoding.events import Block, Draft
    from ..prompt.drafts import uncertain_text

    for event in events:
        if isinstance(event, Draft):
            pieces = uncertain_text(event, engine.tokenizer, engine.options.end_tokens)
            yield SeenDraft(event.block, event.step, pieces)
        else:
            yield SeenBlock(event.text, event.thinking) if isinstance(event, Block) else SeenEnd(event.result)


def health_of(path: str) -> dict[str, Any]:
    """What a server tells of itself: its model, and how many requests run and wait.

    Raises:
        Refused, Gone: it does not tell.
    """
    with closing(_asked(path, "GET", "/health", seconds=HEALTH_SECONDS)) as answer:
        told: dict[str, Any] = json.load(answer)
        return told


def _asked(path: str, method: str, target: str, body: bytes = b"", seconds: float | None = None) -> BinaryIO:
    """The body of an answer, as it comes; `seconds` may pass between two parts of it.

    Raises:
        Refused: the server tells an error.
        Gone: it has ended the connection.
        ConnectionRefusedError: nobody listens. TimeoutError: nothing came in time.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(seconds)
    try:
        connection.connect(path)
        head = f"{method} {target} HTTP/1.0\r\nHost: localhost\r\n{VERSION_HEADER}: {__version__}\r\n"
        answer = connection.makefile("rb")
        with suppress(BrokenPipeError):  # the server has answered before it had read all, and says why
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status = answer.readline().split()
        while (line := answer.readline()).strip():
            pass
    except ConnectionResetError:
        connection.close()
        raise Gone("It has ended the connection.") from None
    except BaseException:
        connection.close()
        raise
    connection.close()  # the file keeps it open
    if not line or len(status) < 2:
        answer.close()
        raise Gone("It has ended the connection.")
    if status[1] != b"200":
        with answer:
            raise _refusal(_json_or_none(answer.read()))
    return answer


def _json_or_none(text: bytes) -> Any:
    with suppress(ValueError):
        return json.loads(text)
    return None


def _refusal(told: Any) -> Refused:
    if not isinstance(told, dict) or "message" not in (error := told.get("error") or {}):
        return Refused("Its answer is not one that this version knows; restart it with this version.", "version")
    return Refused(error["message"], error.get("code"))


def _with_files(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with pictures and videos as bytes with names: the server may not be allowed to read the files."""
    return [
        {**message, "content": [_with_file(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def _with_file(part: dict[str, Any]) -> dict[str, Any]:
    import base64  # here, since most calls have no picture

    source = part.get(part["type"])
    if part["type"] not in ("image", "video") or not isinstance(source, (str, bytes)):
        return part
    if isinstance(source, bytes):
        return {**part, part["type"]: {"name": None, "base64": base64.b64encode(source).decode()}}
    if not stat.S_ISREG(os.stat(source).st_mode):  # a folder of frames; of other things the server tells what they are
        return {**part, part["type"]: os.path.abspath(source)}
    with open(source, "rb") as file:
        return {**part, part["type"]: {"name": source, "base64": base64.b64encode(file.read()).decode()}}
