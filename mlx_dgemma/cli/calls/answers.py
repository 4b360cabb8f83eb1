"""An answer as a command shows it: streamed, with what is to be known of it, as text or as JSON.

Calls of a running server import this, so it imports neither click nor typing nor dataclasses.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence

from ...errors import count
from ..terminal import Terminal, details, segments, summary

TYPE_CHECKING = False  # as typing's
if TYPE_CHECKING:
    from typing import Any

    from ...decoding.events import Result
    from ...engine import Engine
    from ..local import Remote
    from ..output import Output

DEMO_NOTICE = "This is the bundled demo of 6.7 M parameters, a toy. For the real model: mlx-dgemma setup."


class StreamedAnswer:
    """An answer as far as it was streamed. Without a result it was interrupted."""

    def __init__(self) -> None:
        self.text = self.thinking = ""
        self.result: Result | None = None

    @property
    def printed(self) -> str:
        """What stdout takes: the text with a line break at its end, and a line for each tool call."""
        calls = self.result.tool_calls if self.result else []
        ends = self.text.endswith("\n") or (calls and not self.text)
        lines = [json.dumps(call["function"], ensure_ascii=False) + "\n" for call in calls]
        return "".join([self.text, "" if ends else "\n", *lines])

    def as_dict(self) -> dict[str, Any]:
        """The object that --json prints."""
        result = self.result
        return {
            "text": self.text,
            "thinking": self.thinking,
            "tool_calls": result.tool_calls if result else [],
            "finish_reason": result.finish_reason if result else "interrupted",
            "stats": dict(vars(result.stats)) if result else None,
        }


def stream_answer(
    engine: Engine | Remote, stream: Callable[..., Any], terminal: Terminal, silent: bool = False
) -> StreamedAnswer:
    """Start an answer and print it while it is generated, unless `silent`; then print warnings. Ctrl-C stops it."""
    from ..local import SeenBlock, SeenDraft, seen_events

    answer, blocks = StreamedAnswer(), 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        events = stream(drafts=terminal.live)
        try:
            terminal.draw([], "reading the prompt")
            for event in seen_events(engine, events):
                if isinstance(event, SeenDraft):
                    terminal.draw(segments(event.pieces), f"block {event.block + 1}, step {event.step}")
                elif isinstance(event, SeenBlock):
                    blocks += 1
                    answer.text, answer.thinking = answer.text + event.text, answer.thinking + event.thinking
                    terminal.hint(event.thinking)
                    terminal.say("" if silent else event.text)
                else:
                    answer.result = event.result
        except KeyboardInterrupt:
            terminal.interrupted()
        finally:
            events.close()
            terminal.erase()
    result = answer.result
    if not silent and (result or answer.text):
        terminal.say(answer.printed.removeprefix(answer.text))
    noted = result.notes if result else ()
    for message in dict.fromkeys([*(str(warning.message) for warning in caught), *noted]):
        terminal.warn(f"Warning: {message}")
    if result is None:
        terminal.hint(f"Interrupted after {count(blocks, 'finished block')}.")
        return answer
    empty = not answer.text.strip() and not result.tool_calls
    if empty and not noted:  # a note says why
        terminal.warn("Warning: The answer is empty; try another --seed or another prompt.")
    if result.finish_reason == "length" and not empty:
        terminal.hint(f"Cut at {count(len(result.tokens), 'token')}; --max-tokens N makes room for more.")
    terminal.hint(summary(result.stats))
    return answer


def answer_prompt(
    engine: Engine | Remote,
    stream: Callable[..., Any],
    terminal: Terminal,
    options: dict[str, Any],
    as_json: bool,
    verbose: bool,
    output: Output | None = None,
) -> int:
    """Stream the answer of `generate` to where it goes, stdout without an `output`. Returns the exit code."""
    to_file = output is not None and output.path is not None
    answer = stream_answer(engine, stream, terminal, silent=as_json or to_file)
    if verbose and answer.result:
        print_details(engine, answer.result, options, terminal)
    printed = json.dumps(answer.as_dict(), ensure_ascii=False) + "\n" if as_json else answer.printed
    if answer.result is None:
        terminal.say(printed if as_json and not to_file else "")
        return 130
    if output is not None:
        output.write(printed, terminal, said=not as_json)
    elif as_json:
        terminal.say(printed)
    return 0


def print_details(engine: Engine | Remote, result: Result, options: dict[str, Any], terminal: Terminal) -> None:
    """Print what --verbose asks for."""
    if isinstance(engine.options, dict):  # a server told all
        effective = engine.options
    else:
        from dataclasses import asdict

        known = {name: value for name, value in options.items() if name not in ("seed", "thinking")}
        effective = asdict(engine.options.override(**known))
    lines = details(result.stats, effective)
    for line in [*engine.notes, *lines][: None if not terminal.hints else -1]:  # terminals already show the summary
        terminal.warn(line)


def tell_model(name: str | None, notes: Sequence[str], terminal: Terminal) -> None:
    """Print what was chosen while a model was loaded, for people at a terminal, and that None is the demo."""
    if name is None:
        terminal.warn(DEMO_NOTICE)
    for note in notes:
        terminal.hint(note)
