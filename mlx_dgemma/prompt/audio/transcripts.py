"""Speech to text. The model does not hear, so Whisper writes down what is said, and the text stands for the audio."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from ...errors import PromptError, human
from ...installation import add_extra
from ..images import open_file
from ..lanes import HERE, LANES
from ..messages import AUDIO, Message
from .recogniser import COMMAND

WHISPER = "mlx-community/whisper-large-v3-turbo"
VARIABLE = "MLX_DGEMMA_WHISPER"
RATE = 16_000  # samples a second, what Whisper takes
MAX_SECONDS = 3600
MAX_BYTES = 10**9
KEPT = 64  # transcripts that are kept: clients send a conversation's audio again with every turn
LOADING_SECONDS = 900  # in which a server's Whisper must be there, which the first time is downloaded
MISSING = "The model does not hear, and mlx-whisper, which writes down what is said, is not installed; run `{}`."
# Formats with sound in a file of their own; playlists, which name other files, are not among them.
_FORMATS = "wav,w64,aiff,caf,mp3,aac,flac,ogg,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,amr"
_KNOWN = "WAV, MP3, M4A, AAC, FLAC, Ogg, AIFF, CAF or WebM"


@dataclass(frozen=True)
class Transcript:
    """What is said in an audio file, how many seconds it has, and its language as Whisper names it ("en")."""

    text: str
    seconds: float
    language: str | None = None


_recognising = threading.Lock()  # Whisper takes gigabytes: one at a time
_transcripts: OrderedDict[tuple[str, str], Transcript] = OrderedDict()  # by model and samples


def require() -> None:
    """Check that audio can be transcribed here, without importing anything.

    Raises:
        PromptError: mlx-whisper or the decoder is not installed.
    """
    if find_spec("mlx_whisper") is None or find_spec("av") is None:
        raise PromptError(MISSING.format(add_extra("audio")))


def read_sound(source: Any) -> tuple[str, np.ndarray]:
    """The sound of a file, and a name for messages about it.

    Args:
        source: a path, also as a terminal writes it; a `file:` or `data:` URL; bytes; or an open binary file.

    Returns:
        The name, and samples [N], int16 at 16 kHz, of one channel.

    Raises:
        PromptError: it cannot be read, has no sound, or is too long.
    """
    import av

    name, file = open_file(source)
    with file:
        size = file.seek(0, os.SEEK_END)
        if size > MAX_BYTES:
            raise PromptError(f"{name} has {human(size)}; at most {human(MAX_BYTES)} are read, so cut it into pieces.")
        file.seek(0)
        try:
            with av.open(file, options={"format_whitelist": _FORMATS}) as container:
                return name, _samples(name, container)
        except (av.FFmpegError, ValueError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PromptError(
                f"{name} is no audio that can be read, or is damaged ({reason}); give a {_KNOWN} file."
            ) from None


def _samples(name: str, container: Any) -> np.ndarray:
    import av

    stream = next(iter(container.streams.audio), None)
    if stream is None or stream.codec_context is None:
        raise PromptError(f"{name} has no sound that can be decoded; give a {_KNOWN} file.")
    if container.duration is not None:
        _check_seconds(name, container.duration / 1e6)
    resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)
    pieces: list[np.ndarray] = []
    for frame in _frames(container, stream):
        pieces += [one.to_ndarray().reshape(-1) for one in resampler.resample(frame)]
        if len(pieces) % 1000 == 0:
            _check_seconds(name, sum(map(len, pieces)) / RATE)
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.int16)
    if not len(samples):
        raise PromptError(f"{name} holds no sound: its length is 0 seconds.")
    _check_seconds(name, len(samples) / RATE)
    return samples


def _frames(container: Any, stream: Any) -> Any:
    """The frames of a stream, and None, which asks a resampler for what it still holds."""
    yield from container.decode(stream)
    yield None


def _check_seconds(name: str, seconds: float) -> None:
    if seconds > MAX_SECONDS:
        raise PromptError(
            f"{name} has {seconds / 60:.0f} minutes of sound; at most {MAX_SECONDS // 60} are transcribed at once, "
            "so cut it into pieces."
        )


def transcribe(source: Any, model: str | None = None, progress: bool = False) -> Transcript:
    """What is said in an audio file.

    Args:
        source: what `read_sound` takes, or a `Transcript`, which comes back.
        model: a Whisper model in mlx-whisper's layout, a folder or a Hub id; None takes $MLX_DGEMMA_WHISPER, else
            `WHISPER`. A model of the Hub is downloaded when it is first used.
        progress: whether the download may be shown on stderr, and take any time.

    Raises:
        PromptError: the extra `audio` is not installed, the file cannot be read, Whisper failed, or nothing is said.
    """
    if isinstance(source, Transcript):
        return source
    require()
    name, samples = read_sound(source)
    model = os.path.expanduser(model or os.environ.get(VARIABLE) or WHISPER)
    key = model, hashlib.sha256(samples.tobytes()).hexdigest()
    with _recognising:
        if key not in _transcripts:
            found = _recognised(name, samples, model, progress)
            text = " ".join(found["text"].split())
            _transcripts[key] = Transcript(text, len(samples) / RATE, found.get("language"))
        _transcripts.move_to_end(key)
        while len(_transcripts) > KEPT:
            _transcripts.popitem(last=False)
        transcript = _transcripts[key]
    if not transcript.text:
        raise PromptError(f"Whisper heard nothing that is said in {name}; give a recording of speech.")
    return transcript


def _recognised(name: str, samples: np.ndarray, model: str, progress: bool) -> dict[str, Any]:
    """What `recogniser` answers."""
    seconds = None if progress else LOADING_SECONDS + 2 * len(samples) / RATE
    try:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, model, *sys.path],
            input=samples.tobytes(),
            stdout=subprocess.PIPE,
            stderr=None if progress else subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PromptError(f"{model} was not done with {name} after {seconds:.0f} s; give a shorter piece.") from None
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise PromptError(f"{model} ended with status {done.returncode} before {name} was written down.") from None
    if "error" in found:
        reason = found["error"].split("\n")[0].rstrip(".")
        raise PromptError(f"{model} could not write down {name} ({reason}); is ${VARIABLE} a Whisper model for MLX?")
    return found


def with_transcripts(messages: Any, transcript: Callable[[Any], Transcript] = transcribe) -> Any:
    """A prompt whose audio parts are replaced by what is said in them; texts beside them have a blank line between.

    Args:
        messages: a text or chat messages, which are not checked. An audio part is {"type": "audio", "audio": source}
            or, as OpenAI writes it, {"type": "input_audio", "input_audio": {"data": base64, "format"}}.
        transcript: makes a transcript of a source.

    Returns:
        The prompt; a text part that holds transcripts lists their texts under "transcripts".

    Raises:
        PromptError: as `transcribe`.
    """
    if not isinstance(messages, (list, tuple)) or not any(map(_audio_parts, messages)):
        return messages
    return [
        {**message, "content": _written(message["content"], transcript)} if _audio_parts(message) else message
        for message in messages
    ]


def _audio_parts(message: Any) -> list[Message]:
    """The audio parts of something that should be a message."""
    content = message.get("content") if isinstance(message, dict) and message.get("role") == "user" else None
    parts = content if isinstance(content, (list, tuple)) else ()
    return [part for part in parts if isinstance(part, dict) and part.get("type") in AUDIO]


def _written(parts: Sequence[Any], transcript: Callable[[Any], Transcript]) -> list[Any]:
    found: list[Any] = []
    for part in parts:
        if isinstance(part, dict) and part.get("type") in AUDIO:
            said = LANES.get(HERE).wait(partial(transcript, _source(part.get(part["type"])))).text
            part = {"type": "text", "text": said, "transcripts": [said]}  # noqa: PLW2901
        before = found[-1] if found else None
        if before and _is_text(part) and _is_text(before) and ("transcripts" in part or "transcripts" in before):
            found[-1] = {
                "type": "text",
                "text": "\n\n".join(one["text"].strip() for one in (before, part)),  # templates put nothing between
                "transcripts": [*before.get("transcripts", ()), *part.get("transcripts", ())],
            }
        else:
            found.append(part)
    return found


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _source(given: Any) -> Any:
    """The source of an audio part, whose base64 becomes a data URL."""
    if isinstance(given, dict):
        if not isinstance(given.get("data"), str):
            raise PromptError("An input_audio part has no data; give the file in base64.")
        return f"data:audio/{given.get('format')};base64,{given['data']}"
    return given
