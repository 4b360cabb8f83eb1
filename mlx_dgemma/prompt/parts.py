"""`Parts`: an answer's text, cut into what is said, thoughts and tool calls, while it comes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .notation import Call, Tools, read_calls, simple_arguments
from .vocabulary import CALL_END_SIGN, CALL_SIGN, QUOTE_SIGN, SIGNS, THOUGHT_END_SIGN, THOUGHT_SIGN, plain

SPOKEN_CHANNELS = ("final", "answer", "response")  # what stands in them is said
_CHANNEL = re.compile(r"[ \t]*([A-Za-z]{1,16})[ \t]*(?:\n|\Z)")
_THOUGHT_NAMES = ("thought", "thinking", "analysis", "commentary")
_OPENING = re.compile(f"[{THOUGHT_SIGN}{CALL_SIGN}]")
_LEAVES_THOUGHT = re.compile(f"[{THOUGHT_SIGN}{THOUGHT_END_SIGN}{CALL_SIGN}]")
_IN_CALL = re.compile(f"[{QUOTE_SIGN}{CALL_SIGN}{CALL_END_SIGN}]")
_NAME = r"[\w.:/$@-]"
_BEFORE = r"(?<![\w.:/$@\-`\"'(])"  # a call that is quoted is spoken of
_UNMARKED = re.compile(rf"{_BEFORE}call:[ \t]?({_NAME}{{1,128}})[ \t]*([{{(])")
_BEGUN = re.compile(rf"{_BEFORE}(?:c|ca|cal|call|call:[ \t]?{_NAME}{{0,128}}[ \t]*)\Z")
_BLANKS = re.compile(f"[ \t\r\n{CALL_END_SIGN}]*")
_END_OF_LINE = re.compile(rf"[ \t]*(?:({CALL_END_SIGN})|\n|\Z)")
_BEGIN_OF_LINE = re.compile(rf"(?:^|[\n{SIGNS}]|^[ \t]|[\n{SIGNS}][ \t])[ \t]*\Z")
_BRACKET = re.compile(r"[{(]")
_FUNCTION = re.compile(r"\s*([A-Za-z_]\w*[.:/-][\w.:/$@-]*|[A-Za-z]\w*_\w*)\{")  # `body{` is CSS
_PAIRS = {"{": "}", "(": ")"}
_BRACKETS = re.compile(  # and strings
    rf"{QUOTE_SIGN}[^{QUOTE_SIGN}]*{QUOTE_SIGN}"
    rf"|(?<=[:,{{\[(=\s])\"(?:[^\"\\{QUOTE_SIGN}]|\\[^{QUOTE_SIGN}])*\"|[{{}}()]"
)
_LEFT_OVER = " \t\r\n,;}])"
_LONGEST_BEGINNING = 160  # characters that may become a call's name
_TRIED = 8  # markers at which a call that was not whole may end
_CONTEXT = 32  # characters that are looked back at


@dataclass(frozen=True)
class TextPart:
    """What is said."""

    text: str


@dataclass(frozen=True)
class ThoughtPart:
    """A thought, without its channel's name."""

    text: str


@dataclass(frozen=True)
class CallPart:
    """Tool calls."""

    calls: tuple[Call, ...]


@dataclass(frozen=True)
class BrokenPart:
    """A call that cannot be read; its text was said before."""

    text: str


Part = TextPart | ThoughtPart | CallPart | BrokenPart


class Parts:
    """Cuts a text with signs.

    Args:
        tools: the declared ones.
        spelt: spells out the signs inside a string.
        unmarked: whether calls are looked for where no marker opens them.
        thinks: whether the text begins inside a thought.
    """

    def __init__(self, tools: Tools, spelt: Callable[[str], str], unmarked: bool, thinks: bool = False):
        self._tools, self._spelt, self._unmarked = tools, spelt, unmarked
        self._new: list[str] = []
        self._text, self._at = "", 0  # what was added, and how much of it was given
        self._part = THOUGHT_SIGN if thinks else ""  # the sign of what is open
        self._searched = 0  # up to where there is nothing that ends the open part
        self._looked = 0  # up to where no call without a marker begins
        self._quotes = 0  # that were passed in the open call
        self._stops: list[tuple[int, int]] = []  # markers in the open call: places in it, and whether between quotes
        self._behind_call = False
        self._closings: dict[int, int] = {}
        self._found: list[Part] = []

    def add(self, text: str) -> None:
        """Put characters behind."""
        self._new.append(text)

    def read(self, final: bool = False, complete: bool = True) -> list[Part]:
        """The parts that are certain and were not given before.

        Args:
            final: nothing comes any more.
            complete: what ends here the model has ended.
        """
        gone = max(self._at - _CONTEXT, 0)
        self._text = self._text[gone:] + "".join(self._new)
        self._at, self._searched, self._looked = self._at - gone, self._searched - gone, max(self._looked - gone, 0)
        self._new, self._found, self._closings = [], [], {}
        while self._step(final, complete):
            pass
        return self._found

    def _step(self, final: bool, complete: bool) -> bool:
        """Go on to the next part; False: there is nothing to be known."""
        if self._part == THOUGHT_SIGN:
            return self._in_thought(final)
        if self._part == CALL_SIGN:
            return self._in_call(final, complete)
        return self._in_text(final)

    def _open(self, sign: str, at: int) -> None:
        self._part, self._at, self._searched, self._quotes, self._stops = sign, at, at, 0, []

    def _say(self, end: int) -> None:
        if text := plain(self._text[self._at : end]):
            self._found.append(TextPart(text))
        self._at = end

    def _in_text(self, final: bool) -> bool:
        text, start = self._text, self._at
        opening = _OPENING.search(text, max(self._searched, start))
        end = opening.start() if opening else len(text)
        self._searched = end
        if self._behind_call:  # blanks between calls are no text
            blanks = _BLANKS.match(text, start, end)
            rest = blanks.end() if blanks else start
            if not final and not opening and end - rest < 5 and "call:".startswith(text[rest:end]):
                return False
            again = rest == end or (self._unmarked and text.startswith("call:", rest, end))
            self._at, self._behind_call = rest if again else start, False
        if self._unmarked and (call := _UNMARKED.search(text, max(self._at, self._looked), end)):
            return self._unmarked_call(call, end, opening is None, final)
        if opening:
            self._say(end)
            self._open(opening[0], opening.end())
            return True
        begun = _BEGUN.search(text, max(self._at, end - _LONGEST_BEGINNING)) if self._unmarked and not final else None
        self._say(begun.start() if begun else end)
        return False

    def _unmarked_call(self, call: re.Match[str], end: int, last: bool, final: bool) -> bool:
        """Read a call without an opening marker, or say what only looks like one."""
        text, start = self._text, call.start()
        simple = self._simple_call(call, end)
        close = simple[1] - 1 if simple else closing(text, call.end() - 1, self._closings)
        if close is None or close >= end:
            if last and not final:
                self._say(start)
                return False
            self._looked = call.end()  # it stays open
            return True
        read = self._accepted(start, close + 1, simple and [simple[0]])
        self._say(start)
        if read:
            self._found.append(CallPart(tuple(read)))
            self._at, self._behind_call = close + 1, True
            return True
        self._say(close + 1)
        if self._tools.resolve(call[1]) or QUOTE_SIGN in text[start:close]:
            self._found.append(BrokenPart(plain(text[start : close + 1])))
        return True

    def _simple_call(self, call: re.Match[str], end: int) -> tuple[Call, int] | None:
        """A call that can be read at one go, and the place behind it."""
        name = self._tools.resolve(call[1]) or call[1]
        if call[2] == "(" or not self._tools.is_simple(name):
            return None
        found = simple_arguments(self._text, call.end(), end, self._spelt)
        return found and (Call(name, found[0]), found[1])

    def _accepted(self, start: int, end: int, calls: list[Call] | None = None) -> list[Call]:
        """The calls in a part of the text that no marker opens, if they are meant as such; they may have been read."""
        body = self._text[start:end]
        if calls is None:
            result = read_calls(body, self._tools, self._spelt, complete=False)
            if result is None or result[1]:
                return []
            calls = result[0]
        behind = _END_OF_LINE.match(self._text, end)
        if all(call.name in self._tools.parameters for call in calls):
            return calls
        begins = _BEGIN_OF_LINE.search(self._text, max(start - _CONTEXT, 0), start)
        written = QUOTE_SIGN in body or (behind and not self._tools.known)
        return calls if (behind and behind[1]) or (begins and written) else []

    def _in_thought(self, final: bool) -> bool:
        text, start = self._text, self._at
        leaves = _LEAVES_THOUGHT.search(text, max(self._searched, start))
        end = leaves.start() if leaves else len(text)
        self._searched = end
        name = _CHANNEL.match(text, start)
        if name and name[1] in SPOKEN_CHANNELS and (leaves or final or name.end() < len(text)):
            self._open("", name.end())
            return True
        if leaves:
            self._think(end)
            self._open("" if leaves[0] == THOUGHT_END_SIGN else leaves[0], leaves.end())
            return True
        if not final:
            return False
        for call in _UNMARKED.finditer(text, start) if self._unmarked else ():
            close = closing(text, call.end() - 1, self._closings)
            if call.start() >= self._at and close is not None and (read := self._accepted(call.start(), close + 1)):
                self._think(call.start())
                self._found.append(CallPart(tuple(read)))
                self._at = close + 1
        self._think(end)
        self._part = ""
        return False

    def _think(self, end: int) -> None:
        thought = plain(self._text[self._at : end])
        name = _CHANNEL.match(thought)
        if name and name[1] in _THOUGHT_NAMES:
            thought = thought[name.end() :]
        if thought := thought.strip():
            self._found.append(ThoughtPart(thought))
        self._at = end

    def _in_call(self, final: bool, complete: bool) -> bool:
        """Read a call up to its marker, the first one that leaves a whole call before it.

        A marker behind an odd number of quotes is taken for a string's, unless nothing else makes a call.
        """
        text, start = self._text, self._at
        for one in _IN_CALL.finditer(text, max(self._searched, start)):
            self._searched = one.end()
            if one[0] == QUOTE_SIGN:
                self._quotes += 1
                continue
            stop, odd = one.start() - start, self._quotes % 2
            empty = not odd and not _BRACKET.search(text, start, one.start())
            if empty or (not odd and self._close_call(stop, certain=True)):
                return not empty or self._close_call(stop)
            self._stops.append((stop, odd))
            if sum(not odd for _, odd in self._stops) > _TRIED:
                return self._close_call(next(stop for stop, odd in self._stops if not odd))
        self._searched = len(text)
        if not final:
            return False
        self._stops.append((len(text) - start, 0))
        if any(self._close_call(stop, certain=True) for stop, odd in self._stops if odd or stop == len(text) - start):
            return True
        even = [stop for stop, odd in self._stops if not odd]
        return self._close_call(even[0], complete=complete or len(even) > 1)

    def _close_call(self, stop: int, certain: bool = False, complete: bool = True) -> bool:
        """Read the open call up to a place behind its beginning.

        Args:
            stop: the place.
            certain: do so only if the text is a whole call.
            complete: whether the call ends there.

        Returns:
            Whether it was read.
        """
        start, end = self._at, self._at + stop
        body = self._text[start:end]
        result = read_calls(body, self._tools, self._spelt, complete and not certain)
        if certain and (result is None or QUOTE_SIGN in result[1]):
            return False
        if result is None and (inner := _UNMARKED.search(body, 1)):
            result = read_calls(body[inner.start() :], self._tools, self._spelt, complete)
            if result:
                self._say(start + inner.start())
        if result is None:
            if told := plain(body):
                self._found.append(TextPart(told))
            if told.strip():
                self._found.append(BrokenPart(told))
        else:
            self._found.append(CallPart(tuple(result[0])))
            if result[1].strip(_LEFT_OVER):
                self._found.append(TextPart(plain(result[1])))
        again = self._text.startswith(CALL_SIGN, end)
        self._open(CALL_SIGN if again else "", min(end + 1, len(self._text)))
        self._behind_call = not again
        return True


def is_lone_call(text: str, tools: Tools) -> bool:
    """Whether a text is a call and nothing else, although neither a marker nor `call:` begins it."""
    head = _FUNCTION.match(text)
    if head is None or (tools.known and tools.resolve(head[1]) is None):
        return False
    return closing(text, head.end() - 1, {}) == len(text.rstrip()) - 1


def closing(text: str, start: int, found: dict[int, int]) -> int | None:
    """Where the bracket at a place is closed, or None; strings between quotes are passed over.

    Args:
        text: with signs.
        start: place of a { or (.
        found: what earlier searches of the same text have seen, {opening: closing}, and -1 for those that stay open.
    """
    if start in found:
        return None if found[start] < 0 else found[start]
    stack: list[int] = []
    for one in _BRACKETS.finditer(text, start):
        char = one[0]
        if char in "{(":
            stack.append(one.start())
        elif char in "})" and stack:
            while stack and _PAIRS[text[stack[-1]]] != char:
                found[stack.pop()] = -1  # such as a smiley's
            if stack:
                found[stack.pop()] = one.start()
            if start in found:
                return None if found[start] < 0 else found[start]
    found.update(dict.fromkeys(stack, -1))
    found.setdefault(start, -1)
    return None
