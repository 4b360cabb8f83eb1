"""`FileText`: a file's text as the model sees it, and an edited text with what the model cannot see put back.

A chat template trims what stands at a prompt's end, and models write line breaks of one kind and no blanks at a line's
end. What differs in such ways alone is not what was asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

MARK = "\ufeff"  # a byte order mark
_ENDING = re.compile(r"\r\n|\n|\r")


class Line(NamedTuple):
    """A line of a file."""

    text: str
    blanks: str  # at its end
    ending: str

    @property
    def seen(self) -> str:
        """The text as a tokenizer gives it back: its sign for a blank is one."""
        return self.text.replace("▁", " ")


class FileText:
    """A text with its byte order mark, line endings and trailing blanks.

    Args:
        text: the file's.

    Attributes:
        plain: what the model sees: line feeds alone, no mark.
    """

    def __init__(self, text: str):
        self._mark = MARK if text.startswith(MARK) else ""
        whole = text.removeprefix(MARK)
        body = whole.rstrip()
        self._tail = whole[len(body) :]
        self.plain = _ENDING.sub("\n", whole)
        parts = _ENDING.split(body)
        endings = [*_ENDING.findall(body), ""]
        self._lines = [Line(one.rstrip(), one[len(one.rstrip()) :], end) for one, end in zip(parts, endings)]
        known = Counter([*endings[:-1], *_ENDING.findall(self._tail)])
        self._usual = known.most_common(1)[0][0] if known else "\n"

    def restored(self, edited: str, whole: bool = True) -> str:
        """An edited text with the file's own mark, endings and blanks wherever the model changed nothing.

        Args:
            edited: what the model made of `plain`.
            whole: whether it goes on to the end, so that what stands behind the last word stays.
        """
        parts = _ENDING.split(edited.rstrip() if whole else edited)
        new = [Line(one.rstrip(), one[len(one.rstrip()) :], "") for one in parts]
        lines = self._matched(new)
        endings = [one.ending or self._usual for one in lines[:-1]] + [""]
        told = "".join(one.text + one.blanks + ending for one, ending in zip(lines, endings))
        return self._mark + told + (self._tail if whole else "")

    def _matched(self, new: Sequence[Line]) -> list[Line]:
        """The new lines, each with what its old one had."""
        old, found = self._lines, []
        for kind, a, a_end, b, b_end in _operations([one.seen for one in old], [one.text for one in new]):
            for i in range(b, b_end):
                if kind == "equal":
                    one = old[a + i - b]
                    found.append(one._replace(blanks=new[i].blanks or one.blanks))
                elif kind == "replace" and a_end - a == b_end - b:
                    one = old[a + i - b]
                    found.append(Line(new[i].text, new[i].blanks or one.blanks, one.ending))
                else:  # the ending of the line that it stands for, or of the one before
                    near = old[max(min(a + i - b, a_end - 1), 0)]
                    found.append(new[i]._replace(ending=near.ending))
        return found


def _operations(old: Sequence[str], new: Sequence[str]) -> list[tuple[str, int, int, int, int]]:
    """`SequenceMatcher`'s operations, with what is equal at both ends left out of its search."""
    least = min(len(old), len(new))
    head = next((i for i in range(least) if old[i] != new[i]), least)
    tail = next((i for i in range(least - head) if old[-1 - i] != new[-1 - i]), least - head)
    matcher = SequenceMatcher(None, old[head : len(old) - tail], new[head : len(new) - tail], autojunk=False)
    inner = [
        (kind, a + head, a_end + head, b + head, b_end + head) for kind, a, a_end, b, b_end in matcher.get_opcodes()
    ]
    ends = ("equal", len(old) - tail, len(old), len(new) - tail, len(new))
    return [("equal", 0, head, 0, head), *inner, ends]
