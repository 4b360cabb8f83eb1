"""`mode="auto"`: which mode a request takes, from what passes cost on this machine and from what is asked."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from ..decoding.costs import Costs
from ..decoding.options import TOKEN_OPTIONS
from ..decoding.request import Request
from ..prompt.builder import PromptBuilder

# What a step settles and a draft gets right. Published of the release: 12 to 28 steps for a canvas of 256 tokens of
# free text, 2 or 3 for JSON, 13 accepted tokens for a draft of structured text. The demo: bench/RESULTS.md.
SETTLED = {"free": 16.0, "rigid": 85.0, "copy": 85.0}  # tokens that a denoising step settles, after the first step
RIGHT = {"free": 0.75, "rigid": 0.93, "copy": 0.93}  # how often a draft's token is right where those before it are
LENGTH = 200  # tokens of an answer of which nothing is known
CALLS = 64  # tokens of an answer with tools
GAIN = 1.1  # times that another mode must be faster than diffusion
DRAFTS = (4, 8, 16, 32, 64)


class Kind(NamedTuple):
    """What is known of a text before it is written."""

    tokens: int  # that are expected
    text: str = "free"  # or "rigid": in a language, calls of tools; or "copy": mostly what the prompt holds
    canvas: int = 0  # positions of a canvas; 0: the model's
    tokens_only: bool = False  # it has options that diffusion does not know


class Choice(NamedTuple):
    """A mode, and why it was taken: one sentence."""

    mode: str
    reason: str


def choose_mode(costs: Costs, kind: Kind, canvas_length: int) -> Choice:
    """The rule of `mode="auto"`: the mode that takes the least time; diffusion unless another is `GAIN` times faster.

    - causal: a pass for every token.
    - speculative: passes that verify drafts of the best length; text that copies the prompt is drafted for nothing.
    - diffusion: for each canvas one step and one more for every so many tokens, and a step's time to commit a canvas
      that is not the last.

    Quality is not weighed: what is published puts both ways close to each other.

    Args:
        costs: of passes.
        kind: of the text.
        canvas_length: of the model.
    """
    right, length = RIGHT[kind.text], kind.canvas or canvas_length
    taken = {"causal": kind.tokens * costs.token}
    of_drafts = []
    for drafted in DRAFTS:
        passes = max(kind.tokens / sum(right**i for i in range(drafted + 1)), 1)
        draft = 0.0 if kind.text == "copy" else costs.draft_cost(drafted + 1)
        of_drafts.append(passes * (draft + costs.verify_cost(drafted + 1)))
    taken["speculative"] = min(of_drafts)
    if not kind.tokens_only:
        canvases = -(-kind.tokens // length)
        steps = canvases + kind.tokens / SETTLED[kind.text]
        taken["diffusion"] = (steps + canvases - 1) * costs.step_cost(length) / GAIN
    best = min(taken, key=lambda mode: taken[mode])
    unit = "ms" if costs.measured else "tokens' time, reckoned and not measured"
    figures = ", ".join(f"{mode} {taken[mode] * (GAIN if mode == 'diffusion' else 1):.0f}" for mode in sorted(taken))
    return Choice(best, f"for about {kind.tokens} tokens of {kind.text} text: {figures} {unit}")


def settle_mode(builder: PromptBuilder, request: Request, kind: Kind) -> None:
    """Give a request whose mode is "auto" one; does nothing to others.

    Args:
        builder: that made it.
        request: gets options and the reason.
        kind: of its text; of `tokens` no more count than it may take.
    """
    options = request.options
    if options.mode != "auto":
        return
    if options.exact or options.fast:
        choice = Choice("diffusion", "because exact and fast are ways of diffusion")
    else:
        only = any(getattr(options, name) is not None for name in TOKEN_OPTIONS)
        kind = kind._replace(tokens=max(min(kind.tokens, options.max_tokens), 1), tokens_only=only)
        choice = choose_mode(builder.costs(), kind, builder.config.canvas_length)
    request.options, request.mode_reason = replace(options, mode=choice.mode), choice.reason


def kind_of_answer(least: int, thinking: bool, tools: bool) -> Kind:
    """What is known of an answer.

    Args:
        least: tokens of the shortest text of its language; 0: it is in none.
        thinking: whether a thought may come first.
        tools: whether there are tools to call.
    """
    if thinking:
        return Kind(LENGTH)
    if least:
        return Kind(2 * least, "rigid")
    return Kind(CALLS, "rigid") if tools else Kind(LENGTH)
