"""A comparison as one page of HTML that needs nothing else: a table, plots, and all answers side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from .compare import Contestant

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --dim: #5c6470; --paper: #fff; --box: #f4f5f7; --line: #d5d9df;
  --bar: #3b6fd4; --right: #1d7a3c; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --dim: #9aa3af; --paper: #15171a; --box: #1f2327;
  --line: #363c44; --bar: #7aa2f7; --right: #6fcf8e; --wrong: #f2867d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--dim); font-weight: 600; }
.plots, .answers { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); }
figure { margin: 0; padding: .8rem; background: var(--box); border-radius: .5rem; }
figcaption { color: var(--dim); font-size: .9rem; } svg { width: 100%; height: auto; }
svg text { fill: var(--ink); font-size: 12px; } svg rect { fill: var(--bar); }
svg line { stroke: var(--ink); stroke-width: 1.5; }
.answer { padding: .6rem .8rem; background: var(--box); border-radius: .5rem; min-width: 0; }
.answer b { font-size: .9rem; } .dim { color: var(--dim); font-size: .85rem; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
pre { margin: .3rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; }
"""
MOST_TEXT = 4000  # characters of a text that are shown


class Plot(NamedTuple):
    """A bar for each contestant."""

    title: str
    figure: str  # of `Contestant.figures`
    shown: Callable[[float], str]


PLOTS = (
    Plot("Right answers, with 95 % intervals", "share", lambda value: f"{100 * value:.0f} %"),
    Plot("Seconds an answer", "seconds", lambda value: f"{value:.2f} s"),
    Plot("Seconds until the first token or canvas, median", "first_text", lambda value: f"{value:.2f} s"),
    Plot("Tokens a second", "tokens_per_second", lambda value: f"{value:.1f}"),
    Plot("Most memory, GiB", "peak_memory", lambda value: f"{value / 2**30:.2f}"),
)
HEAD = ("", "right", "of", "share", "95 %", "seconds", "first text", "tokens", "tokens/s", "GiB")


def rows(contestants: Sequence[Contestant]) -> list[list[str]]:
    """The table's cells, a row for each contestant."""
    found = []
    for one in contestants:
        f = one.figures()
        cells = [f"{f['right']:g}", f"{f['of']:.0f}", f"{100 * f['share']:.1f} %"]
        cells += [f"{100 * f['low']:.1f} to {100 * f['high']:.1f} %", f"{f['seconds']:.2f}", f"{f['first_text']:.2f}"]
        cells += [f"{f['tokens']:.1f}", f"{f['tokens_per_second']:.1f}", f"{f['peak_memory'] / 2**30:.2f}"]
        found.append([one.name, *cells])
    return found


def page(title: str, contestants: Sequence[Contestant], asked: Sequence[tuple[str, str, str]]) -> str:
    """The page.

    Args:
        title: what was compared.
        contestants: with their answers.
        asked: (place, question, expected answer) of each example.
    """
    name = escape(title)
    parts = [
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{name}</title>\n<style>{STYLE}</style>\n<h1>{name}</h1>",
        _table(contestants),
        '<h2>Plots</h2>\n<div class="plots">',
        *(_plot(one, contestants) for one in PLOTS),
        "</div>\n<h2>Answers</h2>",
        *(_example(i, one, contestants) for i, one in enumerate(asked)),
        "</html>\n",
    ]
    return "\n".join(parts)


def _table(contestants: Sequence[Contestant]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in HEAD)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows(contestants)
    )
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def _plot(plot: Plot, contestants: Sequence[Contestant]) -> str:
    """Bars with their names above them; shares have whiskers."""
    figures = [one.figures() for one in contestants]
    most = 1.0 if plot.figure == "share" else max(f[plot.figure] for f in figures) or 1.0
    height, width, drawn = 36 * len(contestants), 300, []
    for i, (one, f) in enumerate(zip(contestants, figures)):
        top, value = 36 * i, f[plot.figure]
        name = one.name if len(one.name) <= 28 else "\u2026" + one.name[-27:]
        drawn.append(f'<text x="0" y="{top + 13}">{escape(name)}</text>')
        drawn.append(f'<text x="{width}" y="{top + 13}" text-anchor="end">{escape(plot.shown(value))}</text>')
        drawn.append(f'<rect x="0" y="{top + 18}" width="{width * value / most:.1f}" height="10" rx="2"/>')
        if plot.figure == "share":
            low, high = (width * f[name] for name in ("low", "high"))
            drawn.append(f'<line x1="{low:.1f}" y1="{top + 23}" x2="{high:.1f}" y2="{top + 23}"/>')
    told = "; ".join(f"{one.name}: {plot.shown(f[plot.figure])}" for one, f in zip(contestants, figures))
    return (
        f"<figure><figcaption>{escape(plot.title)}</figcaption>\n"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(told)}">{"".join(drawn)}</svg></figure>'
    )


def _example(i: int, asked: tuple[str, str, str], contestants: Sequence[Contestant]) -> str:
    where, question, expected = (_cut(one) for one in asked)
    boxes = [f'<div class="answer"><b>expected</b><pre>{expected}</pre></div>']
    for one in contestants:
        reply = one.replies[i]
        kind = "right" if reply.score == 1 else "wrong"
        mark = kind if reply.score in (0, 1) else f"{reply.score:g}"
        told = f"{reply.tokens} tokens, {reply.seconds:.2f} s" + (", cut" if reply.finish_reason == "length" else "")
        boxes.append(
            f'<div class="answer"><b>{_cut(one.name)}</b> <span class="{kind}">{mark}</span> '
            f'<span class="dim">{told}</span><pre>{_cut(reply.text)}</pre></div>'
        )
    return (
        f'<section><p class="dim">{where}</p><pre>{question}</pre>\n<div class="answers">\n'
        + "\n".join(boxes)
        + "\n</div></section>"
    )


def _cut(text: str) -> str:
    """A text, escaped, and cut where it is very long."""
    return escape(text if len(text) <= MOST_TEXT else text[:MOST_TEXT] + "\u2026")
