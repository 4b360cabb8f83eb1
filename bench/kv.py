"""Quantized keys and values: memory and time at any shape, and what they change in a model's logits.

    python bench/kv.py                                            # a small shape, for a CPU
    python bench/kv.py --shape 26b --prefix 131072 --bits 0 8 4   # a GPU
    python bench/kv.py --noise demo                               # logits of a checkpoint, on any machine

Keys and values are random and never encoded; layers of a kind share their weights. Bits of 0 are plain keys and values.
`token` is a pass over one token behind the prefix, as causal mode makes it. Peaks are above weights, keys and values.
`--noise` answers prompts and compares the logits of the last step's canvas: bfloat16 with float32, and bfloat16 with
the same and quantized keys and values, as the root mean square over positions and vocabulary.
"""

import argparse
import time
from collections.abc import Callable

import mlx.core as mx
from meter import settle
from report import GIB, attempt, finish, machine, on_cpu, ratio, show, spread, table
from shapes import add_arguments

import mlx_dgemma
from mlx_dgemma.check.shapes import raw_config, shared_model
from mlx_dgemma.checkpoint.build import DTYPES
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.decoding.costs import random_prefix
from mlx_dgemma.decoding.lookahead import denoise_block
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma
from mlx_dgemma.model.kv_cache import Prefix

STORY = "There was a small ship, and nobody had painted it for years. "
PROMPTS = ["Spell the word frog.", "Which is larger, 51 or 23?", STORY * 12 + "Spell the word bear."]


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of a call that ends when its work has."""
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def token(model: DiffusionGemma, prefix: Prefix) -> None:
    """A pass over a token, which is not kept."""
    mx.eval(mx.argmax(model.logits(model.encode_ahead(mx.zeros((1, 1), mx.int32), [prefix])), axis=-1), prefix.state)


def steps(model: DiffusionGemma, prefix: Prefix, count: int) -> list[float]:
    """Milliseconds of each step of a canvas that goes on, without the first two."""
    options = GenerationOptions(
        confidence_threshold=0.0, max_denoising_steps=count + 1, canvas="full", certainty_threshold=0.0, patience=0
    )
    found, last = [], time.perf_counter()
    for _ in denoise_block(model, prefix, options, mx.random.key(1)[None]):
        now = time.perf_counter()
        found.append(1e3 * (now - last))
        last = now
        if len(found) == count:
            break
    return found[2:]


def case(model: DiffusionGemma, length: int, bits: int, args: argparse.Namespace) -> dict:
    """Memory and times of one prefix."""
    model.kv_bits = bits or None
    prefix = random_prefix(model, length)
    steps(model, prefix, 4)  # kernels, allocator, room for the canvas
    settle()
    held, kv = mx.get_active_memory(), prefix.nbytes
    print(f"prefix {length}, bits {bits}: KV {kv / GIB:.3f} GiB", flush=True)
    mx.reset_peak_memory()
    found = [one for _ in range(args.runs) for one in steps(model, prefix, args.steps)]
    peak = mx.get_peak_memory() - held
    token(model, prefix)
    passes = [timed(lambda: token(model, prefix)) for _ in range(args.steps)]
    row = {"kv": kv, "step_ms": spread(found), "step_peak": peak, "token_ms": spread(passes[2:] or passes)}
    print(
        f"  a step {show(row['step_ms'], 2)} ms, peak {peak / GIB:.3f} GiB above; a token {show(row['token_ms'], 2)} ms"
    )
    print(flush=True, end="")
    return row


def speed(args: argparse.Namespace) -> list[dict]:
    """Cases of all prefixes and bits."""
    dtype = args.dtype or ("float32" if on_cpu() else "bfloat16")
    raw = raw_config(args.shape, args.layers, args.hidden, args.vocab, args.canvas)
    model, rows = shared_model(raw, DTYPES[dtype], args.recipe), []
    print(f"shape {args.shape}, {args.recipe or dtype}", flush=True)
    for length in args.prefix:
        cases = {}
        for bits in args.bits:
            cases[bits] = attempt(case, model, length, bits, args)
            if "failure" in cases[bits]:
                print(f"prefix {length}, bits {bits} failed: {cases[bits]['failure']}", flush=True)
            settle()
        plain = cases.get(0, {})
        lines = []
        for bits, one in cases.items():
            if "failure" not in one:
                for name in ("step_ms", "token_ms"):
                    beside = plain[name]["median"] if name in plain else None
                    one[f"{name}_ratio"] = ratio(one[name]["median"], beside)
                medians = one["step_ms"]["median"], one["step_ms_ratio"], one["token_ms"]["median"]
                lines.append([str(bits), one["kv"] / GIB, *medians, one["token_ms_ratio"], one["step_peak"] / GIB])
        table(["bits", "KV GiB", "step ms", "ratio", "token ms", "ratio", "step peak GiB"], lines)
        rows.append({"prefix": length, "bits": cases})
    return rows


def noise(args: argparse.Namespace) -> dict:
    """How far logits are from float32's and from bfloat16's, for each number of bits."""
    path = DEMO if args.noise == "demo" else args.noise
    exact, plain = (mlx_dgemma.load(path, dtype=one) for one in ("float32", "bfloat16"))
    found: dict[str, list[float]] = {"bfloat16 - float32": []}
    for prompt in PROMPTS:
        request = exact.prepare(prompt, seed=0)
        tokens = mx.array([request.prompt.tokens], mx.int32)
        answer = exact.generate(prompt, seed=0, max_tokens=exact.config.canvas_length).tokens
        canvas = mx.array([answer + [1] * (exact.config.canvas_length - len(answer))], mx.int32)

        def logits(engine, bits: int | None = None, tokens=tokens, canvas=canvas) -> mx.array:
            engine.model.kv_bits = bits
            prefix = engine.model.new_prefix()
            engine.model.encode(tokens, prefix)
            made = engine.model.logits(engine.model.denoise(canvas, prefix))
            mx.eval(made)
            return made

        pairs = {"bfloat16 - float32": (logits(plain), logits(exact))}
        for bits in (one for one in args.bits if one):
            pairs[f"float32, {bits} bits - float32"] = logits(exact, bits), logits(exact)
            pairs[f"bfloat16, {bits} bits - bfloat16"] = logits(plain, bits), logits(plain)
            pairs[f"bfloat16, {bits} bits - float32"] = logits(plain, bits), logits(exact)
        for name, (a, b) in pairs.items():
            found.setdefault(name, []).append(mx.sqrt(mx.square(a - b).mean()).item())
    table(["logits, root mean square", *map(str, range(len(PROMPTS)))], [[name, *row] for name, row in found.items()])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--bits", type=int, nargs="+", default=[0, 8, 4], choices=[0, 8, 4])
    parser.add_argument("--noise", metavar="MODEL", help="compare logits of this checkpoint; demo: the bundled one")
    args = parser.parse_args()
    found = machine()
    if args.noise:
        finish("kv noise", **found, model=args.noise, rows=noise(args))
    else:
        finish("kv", **found, shape=args.shape, recipe=args.recipe, dtype=args.dtype, rows=speed(args))


if __name__ == "__main__":
    main()
