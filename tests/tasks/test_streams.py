"""Streams and statistics of constrained text, infill, templates and edits."""

from functools import partial

import pytest
from prompts import ADDING, CODE, LEO, PERSON, SAW, SCHEMA, STORY, around, count_of

from mlx_dgemma import Block, Draft, Finished
from mlx_dgemma.decoding.control import fitting_size
from mlx_dgemma.tasks import edit as edit_
from mlx_dgemma.tasks import fill as fill_
from mlx_dgemma.tasks import infill

VERBS = {
    "schema": ("stream", (PERSON,), {"schema": SCHEMA}),
    "regex": ("stream", ("Hi",), {"regex": "[a-z]{5,40}", "max_denoising_steps": 2}),
    "infill": ("infill", around(STORY, "named Leo"), {"prompt": LEO, "length": 2}),
    "infill without a length": ("infill", around(STORY, "named Leo"), {"prompt": LEO}),
    "infill at the end": ("infill", (CODE.removesuffix("left + right"), ""), {"prompt": ADDING}),
    "fill": ("fill", ("A {x}.", {"x": ["cat", "dog"]}), {"max_denoising_steps": 2}),
    "edit": ("edit", (SAW, "Replace cat with dog"), {}),
}


@pytest.mark.parametrize("name", VERBS)
def test_streams_end_in_the_result(engine, few_lengths, name):
    verb, arguments, options = VERBS[name]
    prepare = (
        engine.prepare
        if verb == "stream"
        else partial(getattr({"infill": infill, "fill": fill_, "edit": edit_}[verb], verb), engine.builder)
    )
    *events, finished = engine.run(prepare(*arguments, seed=4, **options))
    *blocks, quiet = engine.run(prepare(*arguments, seed=4, **options), drafts=False)
    steps = finished.result.stats.denoising_steps
    assert isinstance(finished, Finished)
    assert [type(event) for event in events] == [Draft] * steps + [Block]
    assert [type(event) for event in blocks] == [Block]
    assert events[-1] == blocks[-1]
    assert events[-1].text == finished.result.text
    assert events[-2].tokens.tolist() == list(events[-1].tokens)
    one, other = finished.result, quiet.result
    assert (one.text, one.tokens, one.holes) == (other.text, other.tokens, other.holes)
    assert one.stats.canvas_positions == other.stats.canvas_positions
    assert one.text


def test_statistics_count_short_canvases_and_lengths_that_were_tried(engine, few_lengths):
    prefix, suffix = around(CODE, "add")
    given = engine.infill(prefix, suffix, prompt=ADDING, length=1, seed=0)
    behind = count_of(engine, suffix) + 1
    assert behind < 16  # all of it is in view
    size = fitting_size(count_of(engine, "def") + 1 + behind, 64)
    assert size < 64
    assert given.stats.canvas_positions == size * given.stats.denoising_steps
    found = engine.infill(prefix, suffix, prompt=ADDING, seed=0)
    tried = fitting_size(count_of(engine, "def") + 8 + behind, 64) * 8
    assert found.stats.canvas_positions == tried + size * found.stats.denoising_steps
    assert found.stats.denoising_steps == given.stats.denoising_steps
