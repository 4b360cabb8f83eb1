"""Plain patterns of string formats. Each matches only what a strict reader of the format takes."""

from __future__ import annotations

import re

from ..patterns import python_regex_to_plain

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"  # Python has no year 0
_FOURS = "(?:0[48]|[2468][048]|[13579][26])"  # two digits divisible by four, 00 excepted
_LEAP_DAY = f"(?:[0-9]{{2}}{_FOURS}|{_FOURS}00)-02-29"
_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = f"(?:{_YEAR}-{_DAY}|{_LEAP_DAY})"
_MINUTES = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_MINUTES}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+-]{_MINUTES})"
_HEX = "[0-9A-Fa-f]"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,28}[A-Za-z0-9])?"
_FREE_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_WORD = "[A-Za-z0-9_%+-]+"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"{_BYTE}(?:\.{_BYTE}){{3}}"
_GROUP = f"{_HEX}{{1,4}}"
_IPV6 = "|".join(
    [
        f"(?:{_GROUP}:){{7}}{_GROUP}",
        f"(?:{_GROUP}:){{1,7}}:",
        *(f"(?:{_GROUP}:){{1,{7 - n}}}(?::{_GROUP}){{1,{n}}}" for n in range(1, 7)),
        f":(?::{_GROUP}){{1,7}}",
        "::",
    ]
)
_CLOCK = "T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S)"
_DAYS = "(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"
_PLAIN = rf"[A-Za-z0-9._~!$&'()*+,;=@-]|%{_HEX}{{2}}"
_PCHAR = f"(?:{_PLAIN}|:)"
_TAIL = rf"(?:\?(?:{_PCHAR}|[/?])*)?(?:#(?:{_PCHAR}|[/?])*)?"
_HOST = rf"(?:{_FREE_LABEL}(?:\.{_FREE_LABEL})*\.?|\[(?:{_IPV6})\])"
_PATH = f"(?:/{_PCHAR}*)*"
_URI = rf"[A-Za-z][A-Za-z0-9+.-]*:(?://{_HOST}(?::[0-9]{{1,5}})?{_PATH}|{_PCHAR}+{_PATH}|///?{_PCHAR}+{_PATH}){_TAIL}"
_POINTER = "(?:/(?:[^~/]|~[01])*)*"

_PATTERNS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": f"P(?:[0-9]+W|{_DAYS}(?:{_CLOCK})?|{_CLOCK})",
    "email": rf"{_WORD}(?:\.{_WORD})*@(?:{_FREE_LABEL}\.)+[A-Za-z]{{2,}}",
    "hostname": rf"{_LABEL}(?:\.{_LABEL}){{0,4}}",
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "uri": _URI,
    "uri-reference": rf"(?:{_URI}|(?:/|(?:{_PLAIN})+){_PATH}{_TAIL}|#{_PCHAR}*)",
    "uuid": "-".join(f"{_HEX}{{{count}}}" for count in (8, 4, 4, 4, 12)),
    "json-pointer": _POINTER,
    "relative-json-pointer": f"(?:0|[1-9][0-9]*)(?:#|{_POINTER})",
    "regex": "[A-Za-z0-9 _@-]*",
}
_SAME = {
    "idn-email": "email",
    "idn-hostname": "hostname",
    "iri": "uri",
    "url": "uri",
    "iri-reference": "uri-reference",
    "uri-template": "uri",
    "ip-address": "ipv4",
}
FORMATS = tuple(sorted([*_PATTERNS, *_SAME]))


def format_pattern(name: str) -> str:
    """The plain pattern of a format in FORMATS."""
    return python_regex_to_plain(_PATTERNS[_SAME.get(name, name)], json_safe=True)


def is_of_format(name: str, text: str) -> bool:
    """Whether a text is one of those that are written for a format in FORMATS."""
    return re.fullmatch(_PATTERNS[_SAME.get(name, name)], text) is not None
