"""The command chat."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ...errors import DgemmaError, OptionError, count
from ...prompt.paths import local_path
from ..audio import audio_options, hear
from ..calls.answers import print_details, stream_answer
from ..calls.texts import decode_argument, sentence_of
from ..chat_input import chat_input
from ..common import ModelChoice, adapter_option, answer_options, explicit_options, media_options, model_options
from ..conversation import Conversation
from ..markdown import Styler
from ..terminal import Terminal

if TYPE_CHECKING:
    from ...engine import Engine

CHAT_HELP = """\
/image FILE    add a picture to the next turn; dropping it on the window and Enter do the same
/video FILE    add a video, or a folder of frames
/audio FILE    add what is said in it
/system TEXT   set the system message; without TEXT, remove it
/mode NAME     diffusion, causal, speculative or auto; without NAME, tell it
/save FILE     save the conversation; /load FILE goes on with it
/reset         start a new conversation
/help          show this help
/exit          leave; Ctrl-D does the same
!edit TEXT     write the turn in $VISUAL or $EDITOR, beginning with TEXT
Ctrl-C stops an answer, or clears the line; on an empty line, twice leaves."""
DROPPED = {  # by the ends of their names
    "image": (".png", ".jpg", ".jpeg", ".gif", ".webp", ".tif", ".tiff", ".bmp", ".heic", ".heif", ".avif"),
    "video": (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi"),
    "audio": (".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".opus", ".aiff", ".aif", ".caf"),
}


@click.command(epilog="`mlx-dgemma info` shows the checkpoint's own settings.")
@media_options
@audio_options
@model_options
@adapter_option
@answer_options
@click.pass_context
def chat(
    ctx: click.Context,
    images: tuple[str, ...],
    video: str | None,
    audios: tuple[str, ...],
    audio_model: str | None,
    verbose: bool,
    model: ModelChoice,
    system: str | None,
    **options: Any,
) -> None:
    """Chat with the model; each turn encodes only the new text.

    --image, --video and --audio belong to the first turn. /help lists the commands: /image, /video, /audio, /system,
    /mode, /save, /load, /reset, /exit and !edit. A line that ends in \\ continues on the next line, and pasted lines
    stay together. Ctrl-C stops an answer and keeps its finished blocks. If stdin is not a terminal, each of its lines
    is a turn.

    \b
    mlx-dgemma chat --model FOLDER --system "Answer in one sentence."
    mlx-dgemma chat --model FOLDER --seed 1 < questions.txt
    """
    from ...prompt.images import open_image

    if "-" in images:
        raise click.UsageError("- is stdin, which holds the conversation; name the picture's file.")
    terminal = Terminal()
    system, options = decode_argument(system, "--system"), explicit_options(options)
    opened = model.open(terminal)
    opened.options.override(**{name: value for name, value in options.items() if name not in ("seed", "thinking")})
    for path in images:
        open_image(path)  # before the model is loaded
    said = [hear(one, audio_model, terminal) for one in audios]
    talk = Talk(model.load(terminal, opened), options, system, terminal, verbose)
    talk.audio_model, talk.conversation.said = audio_model, said
    for path in images:
        talk.conversation.add_image(path)
    if video:
        talk.conversation.add_video(video)
    if talk.interactive and model.name is None:
        terminal.hint("The demo learned single questions: /reset before the next one.")
    if not talk.run():
        ctx.exit(130)


class Talk:
    """The chat of one run of the command.

    Attributes:
        conversation: what was said.
        interactive: whether someone types; otherwise the first mistake ends it.
        audio_model: of Whisper, or None.
    """

    def __init__(
        self, engine: Engine, options: dict[str, Any], system: str | None, terminal: Terminal, verbose: bool = False
    ):
        self.conversation = Conversation(engine, options, system)
        self.audio_model: str | None = None
        self._engine, self._session, self._terminal, self._verbose = engine, engine.session(), terminal, verbose
        self._input = chat_input(terminal)
        self.interactive = self._input.interactive
        self._leaving = False  # whether Ctrl-C was pressed on an empty line, and nothing since
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": partial(self._attach, "image"),
            "/video": partial(self._attach, "video"),
            "/audio": partial(self._attach, "audio"),
            "/system": self._set_system,
            "/mode": self._set_mode,
            "/save": self._save,
            "/load": self._load,
            "/reset": lambda _: self.conversation.reset(),
            "/help": lambda _: terminal.hint(f"{CHAT_HELP}\n{self._input.keys}"),
        }
        if self.interactive:
            terminal.hint("/help lists the commands, Ctrl-D leaves.")

    def run(self) -> bool:
        """Take turn after turn. Returns false if an answer to a pipe was interrupted."""
        while True:
            try:
                turn = self._input.read()
            except EOFError:
                return True
            except KeyboardInterrupt:
                if not self.interactive or (self._leaving and not self._input.discarded):
                    return self.interactive
                self._leaving = not self._input.discarded
                self._terminal.hint("Ctrl-C again or Ctrl-D leaves." if self._leaving else "")
                continue
            self._leaving = False
            if turn.strip() == "/exit":
                return True
            try:
                if not self.take(turn) and not self.interactive:
                    return False
            except (KeyboardInterrupt, DgemmaError, click.ClickException, OSError) as error:
                if not self.interactive:
                    raise
                if isinstance(error, KeyboardInterrupt):
                    self._terminal.interrupted()
                    self._terminal.hint("Interrupted.")
                else:
                    said = sentence_of(error) if isinstance(error, OSError) else getattr(error, "message", error)
                    self._terminal.warn(f"Error: {said}")

    def take(self, turn: str) -> bool:
        """Do what a turn says: commands at its beginning, each on a line, then a question.

        Returns:
            Whether an answer that was asked for has come to its end.
        """
        if self.interactive and (files := dropped(turn)):
            for kind, path in files:
                self._attach(kind, path)
            return True
        while turn.strip():
            turn = turn.lstrip("\n")
            line, _, more = turn.partition("\n")
            command, _, rest = line.strip().partition(" ")
            if command == "!edit":
                edited = click.edit(turn.strip().removeprefix("!edit").lstrip(), extension=".md")
                turn = (edited or "").strip()
                self._terminal.hint(turn or "Nothing was saved, so nothing is sent.")
                return self._ask(turn) if turn else True
            if command == "/system":
                rest, more = turn.strip().removeprefix("/system"), ""
            elif command not in self._commands:
                if command[:1] == "/" and command[1:].isalpha():
                    self._terminal.warn(f"There is no command {command}; /help lists them.")
                    return True
                return self._ask(turn)
            self._commands[command](rest.strip())
            turn = more
        return True

    def _ask(self, text: str) -> bool:
        """Answer a text. Returns whether the answer has come to its end."""
        talk, terminal = self.conversation, self._terminal
        messages = talk.ask(text)
        terminal.style = Styler()
        try:
            stream = partial(self._engine.stream, messages, system=talk.system, session=self._session, **talk.options)
            answer = stream_answer(self._engine, stream, terminal)
        except BaseException:
            talk.withdraw()
            raise
        finally:
            terminal.style = None
        if answer.result or answer.text:  # the history has no thinking
            talk.answer(answer.text)
        else:
            talk.withdraw()
        if self._verbose and answer.result:
            print_details(self._engine, answer.result, talk.options, terminal)
        return answer.result is not None

    def _attach(self, kind: str, path: str) -> None:
        if not path:
            raise OptionError(f"/{kind} needs a file: /{kind} FILE.")
        if kind == "audio":
            self.conversation.said.append(hear(local_path(path), self.audio_model, self._terminal))
        elif kind == "video":
            self._terminal.hint(f"{self.conversation.add_video(path)} goes with the next turn.")
        else:
            self._terminal.hint(f"{self.conversation.add_image(path)} goes with the next turn.")

    def _set_system(self, text: str) -> None:
        self.conversation.system = text or None

    def _set_mode(self, name: str) -> None:
        if name:
            self.conversation.set_mode(name)
        self._terminal.hint(f"The mode is {self.conversation.mode}.")

    def _save(self, name: str) -> None:
        if not name:
            raise OptionError("/save needs a file: /save FILE.")
        self._terminal.hint(f"Saved to {self.conversation.save(name)}.")

    def _load(self, name: str) -> None:
        if not name:
            raise OptionError("/load needs a file: /load FILE.")
        path = self.conversation.load(name)
        self._terminal.hint(f"{path}: {count(len(self.conversation.messages), 'message')}.")


def dropped(line: str) -> list[tuple[str, str]]:
    """The files that a line consists of, as a terminal writes what is dropped on it: each one's kind and path.

    None if there is more in the line, if a path is not absolute, or if a file is no picture, video or audio.
    """
    line = line.strip()
    try:
        words = [line] if os.path.isfile(local_path(line)) else shlex.split(line)
    except ValueError:  # quotes that do not match
        return []
    found = []
    for word in words:
        path = local_path(word)
        end = os.path.splitext(path)[1].lower()
        kind = next((kind for kind, ends in DROPPED.items() if end in ends), None)
        if kind is None or not os.path.isabs(path) or not os.path.isfile(path):
            return []
        found.append((kind, path))
    return found
