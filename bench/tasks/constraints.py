"""What `control.py` asks: schemas, patterns, holes in answers, and a large vocabulary of made-up pieces."""

import random
import re
from itertools import product
from typing import Any

import tasks

TEXTS, WHOLE, FLAG, DATE = ({"type": "string"}, {"type": "integer"}, {"type": "boolean"},
                            {"type": "string", "format": "date"})  # fmt: skip


def thing(optional: tuple[str, ...] = (), **properties: Any) -> dict:
    """The schema of an object."""
    return {"type": "object", "properties": properties, "required": [key for key in properties if key not in optional]}


def some(items: dict, low: int, high: int) -> dict:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


PERSON = thing(name=TEXTS, age=WHOLE, city=TEXTS)
SCHEMAS = {
    "extract": PERSON,
    "nested": thing(user=thing(name=TEXTS, home=thing(city=TEXTS, zip={"type": "string", "pattern": r"^\d{5}$"}))),
    "array": some({"type": "string", "maxLength": 12}, 2, 4),
    "objects": thing(items=some(thing(id=WHOLE, on=FLAG), 1, 3), total={"type": "number", "minimum": 0}),
    "enum": thing(kind={"enum": ["animal", "plant", "größe", 3, None, True, 1.5]}, unit={"const": "m/s²"}),
    "bounds": thing(a={"type": "integer", "minimum": -7, "maximum": 123},
                    b={"type": "number", "exclusiveMinimum": -0.25, "exclusiveMaximum": 3.75}),
    "optional": thing(("a", "b", "d"), a=TEXTS, b=WHOLE, c=FLAG, d=some(WHOLE, 0, 2)),
    "reference": {"$defs": {"p": thing(("y",), x=WHOLE, y={"type": "number"})},
                  **thing(start={"$ref": "#/$defs/p"}, end={"anyOf": [{"$ref": "#/$defs/p"}, {"type": "null"}]})},
    "dates": thing(day=DATE, at={"type": "string", "format": "date-time"},
                   id={"type": "string", "format": "uuid"}, code={"type": "string", "pattern": "[A-Z]{2}-[0-9]+"}),
    "anything": {"anyOf": [some({"type": ["integer", "null"]}, 1, 5), {"type": "string", "minLength": 3}, PERSON]},
}  # fmt: skip
TEN = thing(name=TEXTS, age={"type": "integer", "minimum": 0, "maximum": 130}, city=TEXTS, mail=TEXTS, active=FLAG,
            colour={"enum": ["red", "green", "blue"]}, tags=some(TEXTS, 0, 5), born=DATE, score={"type": "number"},
            home=thing(street=TEXTS, number=WHOLE))  # fmt: skip
PATTERNS = [p for line in r"""
\d{4}-\d{2}-\d{2}  (0[1-9]|[12]\d|3[01])\.(0[1-9]|1[0-2])\.\d{4}  (?:[01]\d|2[0-3]):[0-5]\d(?::[0-5]\d)?
\d{4}-W\d\d-[1-7]  (Jan|Feb|Mar) \d{1,2}, (19|20)\d\d  (Mon|Tues|Wednes)day  \d{1,2}/\d{1,2}/\d{2}
\d+ (hours?|minutes?) ago  [1-9]\d{0,2}(,\d{3})*  -?\d+  [+-]?\d+\.\d{2}  0x[0-9a-fA-F]{1,8}  [01]{8}
\d+(\.\d+)?([eE][+-]?\d+)?  (0|[1-9]\d?|100)%  \$\d+\.\d\d  (\d+, )*\d+  \d{3,}  yes|no|maybe  (cat|dog) and (fox|owl)
a|ab|abc  (?:a|b|ab)(?:c|bcd)d*  colou?r  (red|green)?blue  x|  (one|two|three)( (one|two|three))*
(?:http|https|ftp)://[a-z]+\.(com|org)  true|false|null  [ab]{3}|[cd]{5}  (A|B|C)-(1|2|3)  gr[ae]y
(left|right|up|down)(, (left|right|up|down)){2}  a{5}  [a-z]{3,7}  (ab){2,4}  ((ab){2,3}c){1,2}  x{0,3}y{1,2}z
[A-Z]{2,}  (\d{2}:){3}\d{2}  (?:[a-f]\d){4,6}  (la ){3}la  \w{20,30}  a{40,60}b  \w+  [A-Z][a-z]+
[A-Z][a-z]+( [A-Z][a-z]+)+  [a-z]+(-[a-z]+)*  \w+ \w+ \w+  (\w+\s)+\w+  \S+ \S+  [^\W\d_]+  [aeiou]+  [^aeiou\s]{4,9}
[\w.+-]+@\w+\.(com|org|net)  [a-z]+@[a-z]+\.[a-z]{2,3}  [a-z0-9._]{3,10}@example\.com  \w+(\.\w+)*@(\w+\.)+\w{2,}
\+\d{1,3} \d{2,4} \d{4,8}  \(\d{3}\) \d{3}-\d{4}  \d{3}-\d{4}  (\+49|0)[1-9]\d{4,9}  (\d{1,3}\.){3}\d{1,3}
#[0-9a-f]{6}  [α-ω]{3,8}  [а-яё]+  [一-龥]{2,5}  [😀-🙏]{1,3}  [äöüß]+ \d  é{2}  [^\x00-\x7f]{2,4}  \D{3}\d{3}
[à-ÿ]{1,4}!  ¿\w+\?  [\u0400-\u04ff]+-\d  (?i)hello  (?i)(yes|no)  (?i)straße  (?i:ab)c  (?i)[k-m]{4}  (?a)\w{3,5}
(?s).{3,9}  (?x) a \d+ # digits  a+?b  \w*?\d  (a|b)??c  [a-z]{2,5}?x  ".*?"  <\w+?>  .{1,20}?\.  a*?a{3}  ^\d+$
\A[a-z]+\Z  ^(a|b)$  ^$|^ok$  (^a|^b)c$  ^\w+@\w+$  (?:^x)(?:y$)  \{"a": \d+\}  \[\d(, \d)*\]
(?P<y>\d{4})/(?P<m>\d\d)
 \w+ {2}  \n\d+\n  \t\w  <eos>  <\|tool_call>\w  \\\d  [\[\]]{2,4}  .\n.  [^a-zA-Z0-9]{5}  \s{3}
def \w+\(\w*\):\n {4}return \w+
""".strip("\n").split("\n") for p in re.split("  (?! )", line)]  # two blanks stand between two


def hole(source: random.Random, answer: str, inside: bool) -> tuple[int, int]:
    """One to four words of an answer, never the last; `inside`: cut within a word at one end or both."""
    words = [match.span() for match in re.finditer(r"\S+", answer)]
    many = source.randint(1, min(4, len(words) - 1))
    first = source.randint(0, len(words) - many - 1)
    (start, begun), (last, stop) = words[first], words[first + many - 1]
    if inside:
        start = source.randint(start, begun - 1)
        stop = source.choice([stop, source.randint(max(start, last) + 1, stop)])
    return start, stop


def determined(case: dict, start: int, stop: int) -> bool:
    """Whether every content word that the hole touches stands elsewhere; code leaves nothing open."""
    content = {*tasks.ANIMALS, *tasks.NAMES, *tasks.PLACES, *tasks.OBJECTS, *tasks.COLORS}
    words = [(match[0], match.end() > start and match.start() < stop) for match in re.finditer(r"\w+", case["answer"])]
    around = {word for word, touched in words if not touched} | set(re.findall(r"\w+", case["prompt"]))
    return case["task"] == "code" or {word for word, touched in words if touched} & content <= around


class Pieces:
    """A tokenizer of made-up pieces: what a large vocabulary has of bytes, punctuation and words."""

    all_special_ids = (0, 1, 2)

    def __init__(self, size: int):
        source, signs = random.Random(0), '"{}[]:,.-▁\n01'
        pieces = dict.fromkeys(["<pad>", "<eos>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256))])
        pieces.update(dict.fromkeys([*map(chr, range(33, 127)), *TEN["properties"]]))
        pieces.update(dict.fromkeys("".join(some) for n in range(1, 5) for some in product(signs, repeat=n)))
        sounds = [part.split() for part in ("bcdfghlmnprst aeiou", "бвгдклмнпрст аеиоу", "漢字仮名交文書 的一是不了人")]
        while len(pieces) < size:
            kind = source.choices(sounds, [3, 1, 1])[0]
            word = "".join(source.choice(part) for _ in range(source.randint(1, 4)) for part in kind)
            pieces[source.choice(["", "▁"]) + source.choice([word, word.capitalize()])] = None
        self._pieces = list(pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(len(self))}

    def convert_ids_to_tokens(self, tokens: list[int]) -> list[str]:
        """As Transformers does."""
        return [self._pieces[token] for token in tokens]
