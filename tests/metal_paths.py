"""What the package does, path by path, as `test_metal.py` records it: each is a function of a dtype and a folder."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from metal_toys import SIZES, loaded, one_step, small, write_toy
from metal_training_paths import adapters, conversions, distilling, tuning
from support import RED, random_tokens, square, strip

from mlx_dgemma.checkpoint import slices
from mlx_dgemma.checkpoint.build import DTYPES
from mlx_dgemma.convert.recipes import MODES
from mlx_dgemma.decoding import costs, rules, step
from mlx_dgemma.distributed.dealing import Span
from mlx_dgemma.distributed.group import Group
from mlx_dgemma.model import attention
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma
from mlx_dgemma.model.kv_cache import Prefix
from mlx_dgemma.model.masks import Narrow
from mlx_dgemma.tasks import hole
from mlx_dgemma.tune.likelihood import next_token_log_probs
from mlx_dgemma.upstream import SwitchLinear

STORY, LARGER = "Write a story", "Which is larger, 51 or 23?"
PERSON = "Write JSON for: Anna is 31 years old and lives in Oslo."
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
FEW = {"seed": 0, "max_denoising_steps": 3, "max_tokens": 20}


def answers(dtype: str, folder: Path) -> None:
    """Prefill and denoising in three modes; the story has positions that need the whole vocabulary."""
    engine = loaded(dtype, folder)
    session = engine.session()
    for mode in ({}, {"exact": True}, {"fast": True}, {"patience": None}):
        engine.generate(STORY, **FEW, **mode)
    engine.generate("Hello.", session=session, **FEW)
    engine.generate(
        [
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "Name three rivers."},
        ],
        session=session,
        **FEW,
    )
    list(engine.stream("Spell the word frog.", prefill_chunk=4, **FEW))
    with patch.object(step, "row_unit", lambda: 4):
        for mode in ({}, {"fast": True}):
            engine.generate_batch([STORY, "Hello."], seeds=[0, 1], max_denoising_steps=3, max_tokens=3, **mode)


def own_rules(dtype: str, folder: Path) -> None:
    """The built-in rules, given as one's own, with quantized keys and values."""
    accept, settle = rules.EntropyBound(0.1, 2), rules.AnyOf((rules.Settled(), rules.Certain(0.1), rules.Unchanged(2)))
    for fast, one in ((False, accept), (True, rules.Confident())):
        loaded(dtype, folder, kv_bits=8).generate(
            STORY, accept=one, settle=settle, renoise=lambda seen, accepted, noise: noise, fast=fast, **FEW
        )


def batches(dtype: str, folder: Path) -> None:
    """Requests of several lengths together, some of which end before the others."""
    engine = loaded(dtype, folder)
    prompts = ["Spell the word frog.", STORY, PERSON]
    for mode in ({}, {"exact": True}, {"fast": True}):
        engine.generate_batch(prompts, seeds=[0, 1, 2], max_denoising_steps=3, max_tokens=20, **mode)


def token_by_token(dtype: str, folder: Path) -> None:
    """Tokens drawn in every way, alone and together, from drafts of the model and of the text, and in a language;
    the likelihood of given ones; and what passes cost."""
    engine = loaded(dtype, folder)
    next_token_log_probs(engine.model, range(2, 9), 1, engine.model.new_prefix())
    few = {"seed": 0, "max_tokens": 8}
    for mode in ("causal", "speculative"):
        engine.generate_batch(["Spell the word frog.", PERSON], mode=mode, temperature=0, **{**few, "max_tokens": 24})
        engine.generate(PERSON, mode=mode, top_p=0.9, top_k=20, min_p=0.01, repetition_penalty=1.1, **few)
        engine.generate("Spell the word bear.", regex="[bear ]+", mode=mode, **few)
    costs.measure(engine.model)


def guided(dtype: str, folder: Path) -> None:
    """Steps whose text a schema or a regular expression chooses, choices, holes and edits."""
    engine = loaded(dtype, folder)
    for mode in ({}, {"fast": True})[: 2 if dtype == "float32" else 1]:
        engine.generate(PERSON, schema=SCHEMA, **FEW, **mode)
        engine.generate("Spell the word bear.", regex="[bear ]+", **FEW, **mode)
    engine.choose(LARGER, ["51", "23"], calibrate=True)
    engine.choose(LARGER, ["51", "23"], answer="It is {}.")
    engine.infill("def add(a, b):\n    return a ", " b", prompt="Add two numbers.", length=2, seed=0)
    with patch.object(hole, "TOGETHER", 1):
        engine.infill("Once there was a ", " in the wood.", seed=0, max_denoising_steps=2)
    engine.builder.options = replace(engine.builder.options, max_denoising_steps=2)
    engine.infill("Once there was a ", " in the wood.", seed=0, length=20, mode="causal")
    engine.fill("{name} is {age}", {"name": 8, "age": "[0-9]+"}, **FEW)
    engine.edit("The cat saw a cat in the barn.", "Replace cat with dog", **FEW)


def pictures(dtype: str, folder: Path) -> None:
    """Pictures of two sizes, alone and together, and a video."""
    engine = loaded(dtype, folder)
    engine.generate("What color is the shape?", images=[square(RED)], **FEW)
    images = [square(RED), strip(RED), strip(RED, 60)]
    engine.generate("Describe the images.", images=images, prefill_chunk=16, **FEW)
    engine.generate("What moves?", video=[strip(RED, x) for x in (40, 80, 100)], **FEW)


def float16_products(dtype: str, folder: Path) -> None:
    """Weights and quantized weights that compute in float16, whatever the dtype of activations."""
    loaded(dtype, folder, compute_dtype="float16").generate("one two three", **FEW)


def long_prefixes(dtype: str, folder: Path) -> None:
    """Attention to more keys than fit at once, buffers that grow, prefixes that are rewound, and quantized ones."""
    engine, bytes_before = loaded(dtype, folder), attention.SCORE_BYTES
    model = small(dtype).eval()
    attention.SCORE_BYTES = 2**15
    try:
        engine.generate("one two three " * 120, prefill_chunk=64, **FEW)
        for model.kv_bits in (8, 4):
            prefix = model.new_prefix()
            for length in (300, 250):
                model.encode(random_tokens(0, 1, length), prefix)
            mx.eval(model.denoise(random_tokens(1, 1, 4), prefix), model.encode_ahead(random_tokens(2, 1, 1), [prefix]))
            mx.eval(model.denoise(random_tokens(1, 1, 4), encoded_briefly(model)))
    finally:
        attention.SCORE_BYTES = bytes_before


def encoded_briefly(model: DiffusionGemma) -> Prefix:
    prefix = model.new_prefix()
    model.encode(random_tokens(0, 1, 9), prefix)
    return prefix


def padded(dtype: str, folder: Path) -> None:
    """A batch with left padding in one prefix, and logits and conditioning of whole vocabularies."""
    model = small(dtype)
    prefix = model.new_prefix(batch_size=2)
    tokens, mask = random_tokens(0, 2, 9), np.ones((2, 9), bool)
    mask[1, :3] = False
    hidden = model.encode(tokens, prefix, mask=mask)
    logits = model.logits(model.denoise(random_tokens(1, 2, 4), prefix))
    mx.eval(hidden, model.denoise(random_tokens(1, 2, 4), prefix, model.condition(logits)))
    head = loaded(dtype, folder).model.head  # its vocabulary has several chunks
    states = mx.zeros((1, 2, SIZES["hidden_size"]), DTYPES[dtype])
    in_chunks = head.predict(states, 1.0, mx.random.key(0)[None], nbytes=1)
    mx.eval(in_chunks.sample, in_chunks.condition(head, 2, nbytes=1))
    prefix.set_rewind_point()
    mx.eval(model.encode(random_tokens(3, 2, 6), prefix))
    prefix.rewind(9)
    prefix.select_rows([1])
    other = prefix.fork()
    other.trim()
    arrays, offset, mark = other.to_arrays()
    other.load_arrays(arrays, offset, mark)
    model.encode(random_tokens(4, 1, 300), other)


def quantized(dtype: str, folder: Path) -> None:
    """A step with every quantization that a checkpoint may have; its graph alone, nothing is computed."""
    for mode, (all_bits, groups) in MODES.items():
        for bits in all_bits:
            for group in groups:
                model = small(dtype)
                nn.quantize(
                    model, group, bits, mode=mode,
                    class_predicate=lambda path, module: hasattr(module, "to_quantized") and "vision" not in path,
                )  # fmt: skip
                model.eval()
                one_step(model)


def custom_kernels(dtype: str, folder: Path) -> None:
    """A step with custom kernels, which compute zeros here: of many rows and of few, with few keys and with many."""
    model, bytes_before = small(dtype), attention.SCORE_BYTES
    model.uses_kernels = True
    model.eval()
    one_step(model)
    attention.SCORE_BYTES = 2**10
    try:
        prefix = model.new_prefix()
        model.encode(random_tokens(0, 1, 40), prefix)
        model.encode(random_tokens(1, 1, 1), prefix)
        model.denoise(random_tokens(2, 1, 4), prefix)
        model.denoise(random_tokens(2, 1, 5), [prefix, prefix.fork()], narrow=Narrow((2, 3), 4))
        model.kv_bits = 8
        prefix = model.new_prefix()
        model.encode(random_tokens(0, 1, 300), prefix)
        mx.eval(model.denoise(random_tokens(2, 1, 4), prefix))
        model.kv_bits = None
    finally:
        attention.SCORE_BYTES = bytes_before
    model.trace_tokens()
    for length in (2, 40):  # the window is 5
        prefix = model.new_prefix()
        model.encode(random_tokens(0, 1, length), prefix)
        model.encode_ahead(random_tokens(1, 1, 1), [prefix])
    model.trace_layers()
    model.denoise(random_tokens(2, 1, 4), prefix)
    packed = small(dtype)
    nn.quantize(packed, 64, 4, class_predicate=lambda _, module: isinstance(module, SwitchLinear))
    packed.eval()
    packed.uses_kernels = True
    packed.encode(random_tokens(1, 1, 1), packed.new_prefix())
    model.config = replace(model.config, image_token_id=3)
    features = mx.zeros((2, model.config.text.hidden_size), model.dtype)
    model.encode(mx.array([[1, 2, 3, 3, 4, 5, 6]]), model.new_prefix(), features=features)


def ranks(dtype: str, folder: Path) -> None:
    """The first of two ranks, which takes its own parts for the other's; and a part of a whole array."""
    handle = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    answered = {"all_sum": lambda x, group: x, "all_gather": lambda x, group: mx.concatenate([x, x])}
    with patch.multiple(mx.distributed, **answered):
        group = Group(handle)
        group.barrier()
        engine = loaded(dtype, folder, group=group)
        for options in ({}, {"exact": True}, {"mode": "causal"}):
            given = {"seed": 0, "max_tokens": 4} if "mode" in options else FEW
            engine.generate(LARGER, **given, **options)
        engine.choose(LARGER, ["51", "23"])
        engine.model.uses_kernels = True
        one_step(engine.model)
    cut, stored = slices.Cut(-1, (Span(0, 32),)), slices.Stored(32, 4, "affine")
    mx.eval(slices.held(mx.ones((2, 2), DTYPES[dtype]), cut, "scales", stored))


PATHS: dict[str, Callable[[str, Path], None]] = {
    path.__name__: path
    for path in (
        answers, own_rules, batches, token_by_token, guided, pictures, float16_products, long_prefixes, padded,
        quantized, custom_kernels, ranks, tuning, distilling, adapters, conversions,
    )
}  # fmt: skip


def run(name: str, dtype: str, folder: Path) -> None:
    """Walk one path; its warnings say nothing about kernels."""
    if not (folder / "toy").exists():
        write_toy(folder / "toy")
    mx.random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PATHS[name](dtype, folder)
