"""`Answer`: tokens become text, thinking and tool calls."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..constraints.spelling import Spelling
from ..decoding.options import MAX_INTEGER
from ..errors import PromptError, shown
from .messages import reject_surrogates
from .notation import Tools
from .parts import CallPart, Part, Parts, TextPart, ThoughtPart, is_lone_call
from .vocabulary import (
    CALL,
    CALL_SIGN,
    PADDING,
    THOUGHT,
    THOUGHT_END,
    THOUGHT_END_SIGN,
    THOUGHT_SIGN,
    TokenText,
    text_of_tokens,
    vocabulary_of,
)

HEADING = "thought\n"  # of the channel for thoughts


def held_back(text: str, stop: Sequence[str]) -> int:
    """How many characters at a text's end may be the beginning of a stop string."""
    pairs = ((one, n) for one in stop for n in range(1, min(len(one), len(text) + 1)))
    return max((n for one, n in pairs if text.endswith(one[:n])), default=0)


BROKEN = "is broken; it was kept as text."  # the end of the note on a call that cannot be read


@dataclass
class Answer:
    """Reads blocks of tokens into text, thinking and tool calls, and knows when the text has ended.

    Attributes:
        text: what the user asked for, without any marker.
        thinking: what stood in the thinking channel.
        tool_calls: [{"id", "type": "function", "function": {"name", "arguments"}}].
        notes: what is to be known of the answer, one sentence each; each was a warning, too.
        tokens: all tokens up to the end, end token left out.
        log_probs: their log-probabilities, in nats.
        finish_reason: "stop", "length" or "tool_calls", once the text has ended.
    """

    tokenizer: Any
    end_tokens: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    skip: int = 0  # characters to leave out at the beginning
    thinks: bool = False  # the prompt ends in a thought that is open
    tools: list[dict] | None = None  # that the prompt declares; with them calls without markers are calls
    thinking_budget: int | None = None  # tokens after which a thought is closed
    spelling: Spelling | None = None  # of a text that must be in a language
    text: str = ""
    thinking: str = ""
    tool_calls: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    stop_string: str | None = None  # the one of `stop` that ended the text

    def __post_init__(self):
        self._vocabulary = vocabulary_of(self.tokenizer)
        self._tools = Tools(self.tools)
        self._parts = Parts(self._tools, self._vocabulary.spelt, self._tools.known, self.thinks)
        self._token_text = TokenText(self._vocabulary)
        self._given = 0, 0  # characters of text and thinking already taken
        opens, closes = self._vocabulary[THOUGHT], (self._vocabulary[THOUGHT_END], self._vocabulary[CALL])
        self._turns = {token: token == opens for token in (opens, *closes) if token is not None}
        self._thinks, self._thought_tokens = self.thinks, 0  # as far as was read, and as `close_thought` counts
        self._heading: list[int] = []  # what is still to come of an opened channel's name

    @property
    def left(self) -> int:
        """Tokens that the text has room for."""
        return self.max_tokens - len(self.tokens)

    def feed(self, tokens: Sequence[int], log_probs: Sequence[float]) -> str | None:
        """Take a block and its log-probabilities; returns the finish reason once there is one."""
        for token, log_prob in zip(tokens, log_probs):
            if token in self.end_tokens:
                self.cut("stop")
            else:
                self.tokens.append(token)
                self.log_probs.append(log_prob)
                self._read(token)
                if self.finish_reason is None and len(self.tokens) == self.max_tokens:
                    self.cut("length")
            if self.finish_reason:
                return self.finish_reason
        self._take_parts(self._parts.read())
        return self.finish_reason

    def cut(self, reason: str) -> None:
        """End the text here; whatever was open is closed, and nothing is lost."""
        self._take_parts(self._parts.read(final=True, complete=reason == "stop"))
        if self.spelling is not None:
            self.spelling.finish()
        self._stop(final=True)
        if self.finish_reason is None:
            self.finish_reason = "tool_calls" if self.tool_calls and reason == "stop" else reason
        padding = self._vocabulary[PADDING]
        if padding in self.tokens and not (self.text.strip() or self.thinking or self.tool_calls):
            self._note(
                f"The answer has no text: its {len(self.tokens)} tokens are padding and markers; "
                "ask again with another seed or more steps."
            )

    def close_thought(self, tokens: Sequence[int], log_probs: Sequence[float]) -> tuple[list[int], list[float]]:
        """A block as it is to be committed: up to where the thinking budget is spent, the thought closed there.

        The line break and the marker that close it are not the model's choice: their log-probabilities are 0.
        """
        close = self._vocabulary[THOUGHT_END]
        if self.thinking_budget is None or close is None:
            return list(tokens), list(log_probs)
        thinks = self._thinks
        for i, token in enumerate(tokens):
            if token in self.end_tokens:
                break
            if token in self._turns:
                thinks, self._heading = self._turns[token], self._vocabulary.encode(HEADING)
            elif thinks and token in self._heading[:1]:  # the channel's name costs nothing
                self._heading = self._heading[1:]
            elif thinks and self._thought_tokens == self.thinking_budget:
                self.notes.append(f"The thought was ended at its budget of {self.thinking_budget} tokens.")
                ending = [*self._vocabulary.encode("\n"), close]
                return [*tokens[:i], *ending], [*log_probs[:i], *[0.0] * len(ending)]
            elif thinks:
                self._heading, self._thought_tokens = [], self._thought_tokens + 1
        return list(tokens), list(log_probs)

    def take(self) -> tuple[str, str]:
        """(text, thinking) that is final and was not taken before.

        Text that may be the beginning of a stop string or of a call waits until that is known.
        """
        end = len(self.text)
        if self.finish_reason is None:
            end = min(end - held_back(self.text, self.stop), self._first_stop())
        text, thinking = self.text[self._given[0] : end], self.thinking[self._given[1] :]
        self._given = max(end, self._given[0]), len(self.thinking)
        return text, thinking

    def preview(self, tokens: Sequence[int]) -> str:
        """The text of a canvas that is not final, up to the first end token."""
        if self.spelling is None:
            return text_of_tokens(self.tokenizer, tokens, self.end_tokens)
        end = next((i for i, token in enumerate(tokens) if token in self.end_tokens), len(tokens))
        return self.spelling.preview(tokens[:end])

    def read_text(self, text: str) -> None:
        """Take a whole answer that spells its markers."""
        signed = self._vocabulary.signed(text)
        before, closed, _ = signed.partition(THOUGHT_END_SIGN)
        if closed and before.lstrip().startswith(HEADING) and THOUGHT_SIGN not in before:
            signed = THOUGHT_SIGN + signed  # the prompt had opened it
        self._parts = Parts(self._tools, self._vocabulary.spelt, unmarked=True)
        self._parts.add(CALL_SIGN + signed if is_lone_call(signed, self._tools) else signed)
        self.cut("stop")

    def _read(self, token: int) -> None:
        self._thinks = self._turns.get(token, self._thinks)
        if self.spelling is not None and not self._thinks and self._vocabulary.sign(token) is None:
            self._take_parts(self._parts.read())
            self._say(self.spelling.add(token))
            return
        self._parts.add(self._token_text.add(token))
        if self.stop:
            self._take_parts(self._parts.read())

    def _take_parts(self, parts: Sequence[Part]) -> None:
        for part in parts:
            if isinstance(part, TextPart):
                self._say(part.text)
            elif isinstance(part, ThoughtPart):
                self.thinking += ("\n" if self.thinking and part.text else "") + part.text
            elif isinstance(part, CallPart):
                self._call(part)
            else:
                self._note(f"The tool call {shown(part.text)} {BROKEN}")

    def _call(self, part: CallPart) -> None:
        for name, arguments in part.calls:
            if self._tools.known and name not in self._tools.parameters:
                names = ", ".join(self._tools.parameters) or "none"
                self._note(f"The answer calls {name}, which is not declared; the tools are {names}.")
            identifier = f"call_{len(self.tool_calls)}"
            function = {"name": name, "arguments": arguments}
            self.tool_calls.append({"id": identifier, "type": "function", "function": function})

    def _note(self, sentence: str) -> None:
        self.notes.append(sentence)
        warnings.warn(sentence, stacklevel=4)

    def _say(self, text: str) -> None:
        if self.finish_reason is not None or not text:
            return
        text, self.skip = text[self.skip :], max(self.skip - len(text), 0)
        self.text += text
        self._stop()

    def _stop(self, final: bool = False) -> None:
        """End the text before the first stop string, unless one that begins earlier may still become complete."""
        at = self._first_stop()
        if self.finish_reason is not None or at == len(self.text):
            return
        if final or at <= len(self.text) - held_back(self.text, self.stop):
            self.stop_string = next(one for one in self.stop if self.text.startswith(one, at))
            self.text, self.finish_reason = self.text[:at], "stop"

    def _first_stop(self) -> int:
        """Where the first stop string begins; the text's end if there is none."""
        return min((at for one in self.stop if (at := self.text.find(one)) >= 0), default=len(self.text))


@dataclass(frozen=True)
class ReadAnswer:
    """What an answer says. The fields are those of a `Result`."""

    text: str
    thinking: str
    tool_calls: list[dict]
    notes: tuple[str, ...] = ()


def read_answer(tokenizer: Any, text: str, tools: list[dict] | None = None) -> ReadAnswer:
    """What an answer says that spells its markers; `Engine.read` has the arguments."""
    if not isinstance(text, str):
        raise PromptError(f"text is {shown(text)}; it should be a text.")
    reject_surrogates("The text", text)
    answer = Answer(tokenizer, (), MAX_INTEGER, tools=tools)
    answer.read_text(text)
    return ReadAnswer(answer.text, answer.thinking, answer.tool_calls, tuple(answer.notes))
