"""A picture of a canvas that settles: every denoising step of one real run, as an animated SVG.

    python bench/picture.py                                        # writes docs/canvas.svg with the bundled demo
    python bench/picture.py --model FOLDER --seed 4 --prompt "..." --output canvas.svg

A position's most probable token is bright where the model is certain of it and pale where it is not. The animation is
plain CSS inside the SVG, so it also runs in an <img>. Readers who ask for reduced motion see the last step.
"""

import argparse
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

import mlx_dgemma

SECONDS, HOLD = 0.8, 4.0  # of a step, and of the last one
WIDTH, MARGIN, LINE, SIZE = 760, 24, 25, 15  # pixels; SIZE is the font's
COLUMN = 0.602 * SIZE  # width of a character in the fonts named below
FONTS = "ui-monospace,SFMono-Regular,Menlo,'DejaVu Sans Mono',monospace"
PALE = 2.0  # nats from which a token is as pale as it gets
BACK, TEXT, DIM, ACCENT = "#161b22", "#f0f6fc", "#8b949e", "#58a6ff"


class Frame(NamedTuple):
    """A canvas after a step: texts [C], whether a blank stands before them [C], and entropies [C] in nats."""

    texts: list[str]
    spaced: list[bool]
    entropy: list[float]


def record(engine: mlx_dgemma.Engine, prompt: str, seed: int) -> tuple[list[Frame], str]:
    """The steps of the first canvas of an answer, and the whole answer."""
    frames, answer = [], ""
    for event in engine.stream(prompt, seed=seed):
        if isinstance(event, mlx_dgemma.Draft) and event.block == 0:
            pieces = engine.tokenizer.convert_ids_to_tokens(np.asarray(event.tokens).tolist())
            special = [piece in engine.tokenizer.all_special_tokens for piece in pieces]
            texts = ["·" if one else piece.replace("▁", "") for piece, one in zip(pieces, special)]
            spaced = [one or piece.startswith("▁") for piece, one in zip(pieces, special)]
            frames.append(Frame(texts, spaced, np.asarray(event.entropy).tolist()))
        elif isinstance(event, mlx_dgemma.Finished):
            answer = event.result.text
    return frames, answer


def breaks(frames: list[Frame]) -> list[int]:
    """The line of every position, so that the longest text of any step fits: words move, but never to another line."""
    lines, x = [0], 0.0
    for spaced, *texts in zip(frames[-1].spaced, *(frame.texts for frame in frames)):
        width = (max(map(len, texts)) + 1) * COLUMN
        full = spaced and x + width > WIDTH - 2 * MARGIN - COLUMN  # a full stop may follow
        lines.append(lines[-1] + full)
        x = width if full else x + width
    return lines[1:]


def lay(frame: Frame, lines: list[int], top: float) -> str:
    """A frame's text, a line of the canvas a <text>."""
    rows = [""] * (lines[-1] + 1)
    for text, spaced, nats, line in zip(*frame, lines):
        blank = " " if spaced and rows[line] else ""
        shade = f"{1 - 0.72 * min(max(nats, 0) / PALE, 1):.2f}"
        rows[line] += f'{blank}<tspan opacity="{shade}">{escape(text)}</tspan>'
    return "".join(f'<text x="{MARGIN}" y="{top + i * LINE:.0f}">{row}</text>' for i, row in enumerate(rows))


def bars(frames: list[Frame], shown: int, y: float) -> str:
    """One tick a step, those that are done in colour."""
    width = (WIDTH - 2 * MARGIN - 150) / len(frames)
    ticks = (
        f'<rect x="{MARGIN + 150 + i * width:.1f}" y="{y - 6:.1f}" width="{width - 4:.1f}" height="4" rx="2" '
        f'fill="{ACCENT if i <= shown else "#30363d"}"/>'
        for i in range(len(frames))
    )
    return f'<text x="{MARGIN}" y="{y}" fill="{DIM}">step {shown + 1} of {len(frames)}</text>' + "".join(ticks)


def draw(frames: list[Frame], prompt: str, seed: int) -> str:
    """The SVG's text."""
    lines, top = breaks(frames), MARGIN + 3 * LINE
    height = top + lines[-1] * LINE + 2 * LINE + 8
    total = SECONDS * (len(frames) - 1) + HOLD
    rules, groups = [], []
    for i, frame in enumerate(frames):
        start, end = 100 * SECONDS * i / total, 100 if i == len(frames) - 1 else 100 * SECONDS * (i + 1) / total
        after = "" if end == 100 else f"{end:.2f}%,100%{{visibility:hidden}}"
        before = "" if i == 0 else "0%{visibility:hidden}"
        rules.append(f"@keyframes k{i}{{{before}{start:.2f}%{{visibility:visible}}{after}}}")
        rules.append(f"#f{i}{{animation:k{i} {total:.1f}s step-end infinite}}")
        hidden = "" if i == len(frames) - 1 else ' visibility="hidden"'
        groups.append(f'<g id="f{i}"{hidden}>{lay(frame, lines, top)}{bars(frames, i, height - 20)}</g>')
    still = "@media (prefers-reduced-motion:reduce){g{animation:none!important}}"
    command = f'mlx-dgemma generate --seed {seed} "{prompt}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="{FONTS}" font-size="{SIZE}" fill="{TEXT}">'
        f"<title>A canvas of {len(lines)} tokens settles in {len(frames)} steps</title>"
        f"<style>{''.join(rules)}{still}</style>"
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="{BACK}" stroke="#30363d"/>'
        f'<text x="{MARGIN}" y="{MARGIN + LINE - 5}"><tspan fill="{ACCENT}">$</tspan> {escape(command)}</text>'
        f"{''.join(groups)}</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or Hub id; without one the bundled demo")
    parser.add_argument("--prompt", default="Tell a story about a duck named Leo.")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs" / "canvas.svg")
    args = parser.parse_args()
    frames, answer = record(mlx_dgemma.load(args.model), args.prompt, args.seed)
    args.output.write_text(draw(frames, args.prompt, args.seed), encoding="utf-8")
    print(f"{len(frames)} steps, {args.output.stat().st_size} bytes: {answer}", file=sys.stderr)


if __name__ == "__main__":
    main()
