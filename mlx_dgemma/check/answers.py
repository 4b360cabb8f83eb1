"""The demo in every mode and verb, on prompts whose answers are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from ..engine import Engine
from .lines import Line, attempt, judged

PERSON = "Write JSON for: Anna is 31 years old and lives in Oslo."
ANNA = '{"name": "Anna", "age": 31, "city": "Oslo"}'
# The demo sorts these with every seed; of five numbers fast gets some wrong, on any machine.
SORT = "Sort these numbers: 64, 21, 88, 5"
SORTED = "5, 21, 64, 88"
STORY = "Tell a story about a cat named Leo."
ADD = "Write a Python function that adds two numbers left and right."
ADDED = "(left, right):\n    return left + right"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
LARGER = "Which is larger, 51 or 23?"
MODES: dict[str, dict[str, Any]] = {"default": {}, "exact": {"exact": True}, "fast": {"fast": True}}


class Case(NamedTuple):
    """A question to the demo and what is known of its answer."""

    name: str
    ask: Callable[[Engine], Any]
    fits: Callable[[Any], bool]


def is_story(text: str) -> bool:
    """Whether a text tells of Leo, as far as a few words show."""
    return "Leo" in text


def cases(story_steps: int = 12) -> list[Case]:
    """All cases; each runs in well under a second on two cores but the stories, which take so many steps."""
    found = []
    for mode, options in MODES.items():
        found += [
            Case(f"{mode}: JSON", _generate(PERSON, **options), ANNA.__eq__),
            Case(f"{mode}: sorting", _generate(SORT, **options), SORTED.__eq__),
            # Not certain at once, so that some positions are conditioned on the whole vocabulary.
            Case(f"{mode}: a story", _generate(STORY, max_denoising_steps=story_steps, **options), is_story),
        ]
    fill = '{{"name": "{name}", "age": {age}, "city": "{city}"}}'
    holes: dict[str, int | str | list[str]] = {"city": 12, "age": r"\d+", "name": ["Anna", "Bob", "Anna Maria"]}
    pictures = [_circle(x) for x in (40, 80, 120)]
    return [
        *found,
        Case("thinking", _generate("What is 25 + 31?", thinking=True), "25 + 31 = 56.".__eq__),
        Case(
            "schema",
            _generate(PERSON.replace("JSON", "JSON with name and age"), schema=SCHEMA),
            '{"name": "Anna", "age": 31}'.__eq__,
        ),
        Case("regex", _generate(SORT, regex=r"\d+(, \d+){3}"), SORTED.__eq__),
        Case("infill", lambda engine: engine.infill("def ", ADDED, prompt=ADD, seed=0, length=1).text, "add".__eq__),
        Case("fill", lambda engine: engine.fill(fill, holes, prompt=PERSON, seed=0).text, ANNA.__eq__),
        Case(
            "edit",
            lambda engine: engine.edit("The cat saw a cat in the barn.", "Replace cat with dog", seed=0).text,
            "The dog saw a dog in the barn.".__eq__,
        ),
        Case("choose", lambda engine: engine.choose(LARGER, ["51", "23"])["51"], lambda share: share > 0.9),
        Case("picture", _generate("What is in the image?", images=pictures[1:2]), "A red circle.".__eq__),
        Case("video", _generate("What happens in the video?", video=pictures), "A red circle moves right.".__eq__),
        Case("batch", _batch, ["f r o g", SORTED].__eq__),
    ]


def lines(engine: Engine) -> Iterator[Line]:
    """The lines of this section, one for each case."""
    for case in cases():
        yield answered(case, engine)


def answered(case: Case, engine: Engine) -> Line:
    """Ask, and compare the answer with what is known."""

    def ask() -> Line:
        got = case.ask(engine)
        return judged(case.name, case.fits(got), f"{got:.4f}" if isinstance(got, float) else repr(got))

    return attempt(case.name, ask)


def _generate(prompt: str, **options: Any) -> Callable[[Engine], str]:
    return lambda engine: engine.generate(prompt, seed=0, max_tokens=64, **options).text


def _batch(engine: Engine) -> list[str]:
    results = engine.generate_batch(["Spell the word frog.", SORT], seeds=[0, 0], max_tokens=64)
    return [result.text for result in results]


def _circle(x: int) -> Image.Image:
    """A red circle at this place of a light square."""
    picture = Image.new("RGB", (160, 160), (250, 250, 250))
    ImageDraw.Draw(picture).ellipse((x - 26, 54, x + 26, 106), fill=(220, 40, 40))
    return picture
