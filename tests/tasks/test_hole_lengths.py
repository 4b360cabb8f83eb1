"""How the length of a hole is found: few passes, between which others get on."""

import mlx.core as mx
import pytest

from mlx_dgemma.decoding.control import Control
from mlx_dgemma.decoding.events import Draft
from mlx_dgemma.decoding.loop import Loop
from mlx_dgemma.decoding.session import Session
from mlx_dgemma.tasks.hole import TOGETHER
from mlx_dgemma.tasks.infill import LONGEST, infill


@pytest.mark.parametrize(
    ("prefix", "suffix", "limit", "passes"),
    [
        ("def add(", "):\n    return left + right", None, 1),  # one look says it
        ("def add(left, right):\n    return", "\n", None, 2),  # eight lengths are compared
        ("def add(left, right):\n    return", "\n", 4, 1),  # so few are compared at once
    ],
)
def test_a_length_is_found_in_a_pass_or_two(engine, prefix, suffix, limit, passes):
    request = infill(engine.builder, prefix, suffix, seed=0, max_tokens=limit)
    session = Session(engine.model, 256)
    encoded = session.encode_all(request.prompt, None)
    before = encoded.offset
    made = list(request.control.prepare(engine.model, encoded, request.options, mx.random.key(0)))
    assert len(made) == passes
    assert sum(made) <= engine.config.canvas_length * TOGETHER
    assert (encoded.batch_size, encoded.offset) == (1, before)
    assert not request.control.full and len(request.control._lengths) == 1
    assert request.control._lengths[0] <= (limit or LONGEST)


NEVER = {"patience": 0, "certainty_threshold": 0, "confidence_threshold": 0}  # settles


class Looks(Control):
    """Looks at its prompt in three passes, and remembers what others had done by then."""

    def __init__(self, others):
        self._others, self.seen = others, []

    def prepare(self, model, prefix, options, key):
        for _ in range(3):
            self.seen.append(len(self._others))
            yield 0


def test_others_get_on_between_two_passes(engine):
    drafts = []
    looking = engine.prepare("Spell the word cat.", seed=0, max_denoising_steps=1)
    looking.control = control = Looks(drafts)
    other = engine.prepare("Count from 1 to 25.", seed=0, max_tokens=30, max_denoising_steps=8, **NEVER)
    other.drafts = True
    loop = Loop(engine.model)
    loop.add(other)
    loop.add(looking)
    while loop.requests:
        for request, event in loop.step():
            if request is other and isinstance(event, Draft):
                drafts.append(event)
    assert control.seen == sorted(set(control.seen)), "a step of the other lies between two passes"
    assert len(control.seen) == 3
