"""Audio of the command line: transcribed before the model is loaded, so that both need not be in memory together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import click

from ..prompt.messages import Message, messages_of
from .common import combine
from .options.kinds import MediaPath
from .terminal import Terminal

SHOWN = 400  # characters of a transcript on stderr; the result has all of it

audio_options = combine(
    click.option(
        "--audio",
        "audios",
        type=MediaPath(exists=True, dir_okay=False),
        multiple=True,
        help="Audio file whose transcript stands before the prompt (needs the extra audio); repeatable.",
    ),
    click.option(
        "--audio-model",
        metavar="PATH_OR_ID",
        envvar="MLX_DGEMMA_WHISPER",
        show_default="$MLX_DGEMMA_WHISPER, else mlx-community/whisper-large-v3-turbo",
        help="Whisper model that transcribes audio.",
    ),
)


def hear(source: str, model: str | None, terminal: Terminal) -> str:
    """Transcribe a file, and tell the beginning of the transcript on stderr.

    Args:
        source: its path, also as a terminal writes it.
        model: of Whisper; None takes the default.
        terminal: where it is told.

    Raises:
        PromptError: as `audio.transcribe`.
    """
    from ..prompt.audio.transcripts import transcribe

    name = os.path.basename(source.rstrip())
    terminal.draw([], f"transcribing {name}")
    try:
        said = transcribe(source, model, progress=terminal.hints).text
    finally:
        terminal.erase()
    terminal.warn(f"{name} says: {said if len(said) <= SHOWN else said[:SHOWN] + ' …'}")
    return said


def user_turn(
    text: str, said: Sequence[str] = (), images: Sequence[Any] = (), video: Any = None, system: str | None = None
) -> list[Message]:
    """The messages of a user's turn: pictures, what is said in audio, and the text, with blank lines between texts.

    Raises:
        PromptError: as `messages_of`.
    """
    if not said:
        return messages_of(text, system, images, video)
    whole = "\n\n".join(filter(str.strip, [*said, text]))
    messages = messages_of(whole, system, images, video)
    media = messages[-1]["content"][:-1] if images or video else []
    messages[-1]["content"] = [*media, {"type": "text", "text": whole, "transcripts": [*said]}]
    return messages
