"""What the package does, path by path, as `test_metal.py` records it: each is a function of a dtype and a folder."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from click.testing import CliRunner
from mlx.optimizers import clip_grad_norm
from mlx.utils import tree_flatten, tree_map
from support import DATA, FULL, RED, SLIDING, random_tokens, small_config, small_model, square

import mlx_dgemma
from mlx_dgemma.adapters.deltas import add_adapter, add_denoising_adapter, target_paths
from mlx_dgemma.checkpoint import slices
from mlx_dgemma.checkpoint.build import DTYPES
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.cli.main import main
from mlx_dgemma.convert.conversion import convert
from mlx_dgemma.convert.recipes import MODES
from mlx_dgemma.convert.rounding import dwq
from mlx_dgemma.convert.rounding import run as rounding
from mlx_dgemma.decoding import costs, rules, step
from mlx_dgemma.decoding.canvas import CanvasBatch
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.decoding.step import plain_step
from mlx_dgemma.distributed.dealing import Span
from mlx_dgemma.distributed.group import Group
from mlx_dgemma.engine import Engine
from mlx_dgemma.model import attention
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma
from mlx_dgemma.model.kv_cache import Prefix
from mlx_dgemma.model.masks import Narrow
from mlx_dgemma.tasks import hole
from mlx_dgemma.tune.config import TrainerConfig
from mlx_dgemma.tune.likelihood import next_token_log_probs
from mlx_dgemma.tune.objective import VARIANTS, Batch, draw_noise
from mlx_dgemma.tune.quick.config import DistillConfig
from mlx_dgemma.tune.quick.distill import distill
from mlx_dgemma.tune.quick.loss import Distillation, StateBatch
from mlx_dgemma.tune.quick.replay import Trajectory
from mlx_dgemma.tune.trainer import Trainer
from mlx_dgemma.tune.workers import loss_and_gradients
from mlx_dgemma.upstream import SwitchLinear

STORY, LARGER = "Write a story", "Which is larger, 51 or 23?"
PERSON = "Write JSON for: Anna is 31 years old and lives in Oslo."
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
# Multiples of every quantization's group.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "head_dim": 32,
    "global_head_dim": 64,
}
FEW = {"seed": 0, "max_denoising_steps": 3, "max_tokens": 20}


def write_toy(folder: Path) -> Path:
    """A checkpoint with the demo's tokenizer and random weights: a layer of each type, and a tower of one layer."""
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("model*"))
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"].update(
        SIZES, num_hidden_layers=2, layer_types=[SLIDING, FULL], num_attention_heads=4, num_experts=4
    )
    raw["vision_config"].update(num_hidden_layers=1, use_clipped_linears=True)
    raw["canvas_length"] = 16
    (folder / "config.json").write_text(json.dumps(raw))
    random = np.random.default_rng(0)

    def drawn(a: mx.array) -> mx.array:
        noise = random.random(a.shape, np.float32) - 0.5
        return mx.array(noise * 2 * a.shape[-1] ** -0.5 if a.ndim > 1 else 1 + noise / 4).astype(mx.bfloat16)

    weights = tree_map(drawn, DiffusionGemma(ModelConfig.from_dict(raw)).parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(weights)))
    return folder


def loaded(dtype: str, folder: Path, **options) -> Engine:
    return mlx_dgemma.load(folder / "toy", dtype=dtype, ignore_memory=True, dequantize=False, **options)


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
    """The built-in rules, given as one's own."""
    accept, settle = rules.EntropyBound(0.1, 2), rules.AnyOf((rules.Settled(), rules.Certain(0.1), rules.Unchanged(2)))
    for fast, one in ((False, accept), (True, rules.Confident())):
        loaded(dtype, folder).generate(
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
        engine.generate_batch(["Spell the word frog.", PERSON], mode=mode, temperature=0, **{**few, "max_tokens": 70})
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
    images = [square(RED), DATA / "two_images_0.png", DATA / "image_0.png"]
    engine.generate("Describe the images.", images=images, prefill_chunk=16, **FEW)
    engine.generate("What moves?", video=[square(RED, x) for x in (60, 80, 100)], **FEW)


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
            model.encode(random_tokens(0, 1, 300), prefix)
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


def small(dtype: str) -> DiffusionGemma:
    """A small random model in a dtype; its sizes are multiples of every quantization's group."""
    mx.random.seed(0)  # or the graph of MLX's random state grows with every model whose first weights are not computed
    model = DiffusionGemma(ModelConfig.from_dict(small_config(**SIZES)))
    model.update(tree_map(lambda a: a.astype(DTYPES[dtype]), weights()))
    return model


@lru_cache
def weights() -> dict:
    """Random weights of a small model."""
    return small_model(scale=0.1, **SIZES).parameters()


def one_step(model: nn.Module) -> list[mx.array]:
    """Prefill and two steps as a graph: of every layer, the head and the conditioning."""
    prefix = model.new_prefix()
    model.encode(random_tokens(0, 1, 40), prefix)
    batch = CanvasBatch(model, prefix, GenerationOptions(), mx.random.key(0)[None])
    for dense in (4, 2):
        forward = plain_step(batch, batch.rows.last, batch.steps, dense)
        batch.rows = batch.rows._replace(last=forward)
    return [forward.canvas, model.logits(model.denoise(forward.canvas, prefix))]


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
    packed = small(dtype)
    nn.quantize(packed, 64, 4, class_predicate=lambda _, module: isinstance(module, SwitchLinear))
    packed.eval()
    packed.uses_kernels = True
    packed.encode(random_tokens(1, 1, 1), packed.new_prefix())
    model.config = replace(model.config, image_token_id=3)
    features = mx.zeros((2, model.config.text.hidden_size), model.dtype)
    model.encode(mx.array([[1, 2, 3, 3, 4, 5, 6]]), model.new_prefix(), features=features)


def ranks(dtype: str, folder: Path) -> None:
    """The first of two ranks, which takes its own parts for the other's; and groups that are halved."""
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
    cut, stored = slices.Cut(-1, (Span(0, 32),)), slices.Stored(64, 4, "affine")
    mx.eval(slices.held(mx.ones((2, 2), DTYPES[dtype]), cut, "scales", stored, 32))


def tuning(dtype: str, folder: Path) -> None:
    """Losses, gradients and optimizer steps of adapters and whole models; in 16 bits their graph alone."""
    tokens, canvas = np.array(random_tokens(7, 2, 7)), np.array(random_tokens(8, 2, 4))
    batch = Batch(tokens, np.ones(tokens.shape, bool), canvas, np.ones(canvas.shape, bool))
    targets = ("attention", "mlp", "self-conditioning")
    runs = [
        {"kind": "lora", "targets": (*targets, "experts", "router")},
        {"kind": "lora", "optimizer": "muon"},
        {"kind": "dora", "targets": targets, "dropout": 0.1, "recompute": False},
        *([{"kind": "full", "recompute": False}] if dtype == "float32" else []),
    ]
    for i, changes in enumerate(runs):
        rank = {} if changes["kind"] == "full" else {"rank": 2}
        config = TrainerConfig(**{"steps": 3, "warmup": 1, "accumulate": 2, **rank, **changes})
        for objective in list(VARIANTS.values())[: None if i == 0 else 1]:
            trainer = Trainer(small(dtype), config, objective)
            if dtype == "float32":
                trainer.update([batch, batch])
                trainer.validation_loss(batch, 0)
                continue
            noise = draw_noise(batch, objective, 40, mx.random.key(0))
            _, gradients = loss_and_gradients(trainer.model, objective, batch, noise)
            clipped, _ = clip_grad_norm(tree_map(lambda a, b: (a + b) / 2, gradients, gradients), 1.0)
            trainer.optimizer.update(trainer.model, clipped)
        if dtype == "float32":
            (run := folder / f"run{i}").mkdir()
            trainer.save(run, {})
            trainer.resume(run, {})
        trainer.close()


def distilling(dtype: str, folder: Path) -> None:
    """A distillation, and its step where one answer is learned and one prediction is kept; in 16 bits its graph."""
    tokens, canvas = np.array(random_tokens(7, 2, 7)), np.array(random_tokens(8, 2, 4))
    learned, loss, model = np.array([1, 0], np.float32), Distillation(), small(dtype)
    conditioning = np.zeros((2, 4, model.config.text.hidden_size), np.float16)
    every = np.ones(tokens.shape, bool), np.ones(canvas.shape, bool)
    batch = StateBatch(tokens, every[0], canvas, learned, canvas, every[1], learned, learned > 0, conditioning)
    add_denoising_adapter(model, lambda: Trainer(model, TrainerConfig(rank=2, steps=3), loss))
    noise = loss.draw(batch, 40, mx.random.key(0))
    _, gradients = loss_and_gradients(model, loss, batch, noise)
    if dtype == "float32":
        mx.eval(gradients)
        prompts = folder / "prompts.txt"
        prompts.write_text("Say cat.\nSay dog.\nSay owl.")
        plan = DistillConfig(
            str(prompts), folder / "differ", teacher="default", best_of=2, agree=2, open_weight=1,
            batch_size=3, states=2, held_back=1, max_tokens=20,
        )  # fmt: skip
        list(distill(loaded(dtype, folder), TrainerConfig(rank=2, steps=2, layers=1), plan))
        Trajectory.of(np.zeros((2, 4), np.int32), np.ones((2, 4), np.float32), [1], 4)


def adapters(dtype: str, folder: Path) -> None:
    """An adapter in the model; in float32 it is also tuned, evaluated and fused from the command line."""
    tuned = folder / "adapter"
    if dtype == "float32":
        data = folder / "data.jsonl"
        lines = [
            json.dumps({"prompt": f"Say {word} twice.", "completion": f"{word} {word}"}) for word in ("cat", "dog")
        ]
        data.write_text("\n".join(lines))
        convert(folder / "toy", folder / "4bit", "4bit", dtype)
        brief = [
            "--kind",
            "dora",
            "--steps",
            "1",
            "--batch-size",
            "2",
            "--validate",
            "1",
            "--generate",
            "0",
            "--dtype",
            dtype,
        ]
        for command in (
            ["tune", data, "--model", folder / "toy", "--output", tuned, *brief],
            [
                "evaluate",
                data,
                "--model",
                folder / "toy",
                "--adapter",
                tuned,
                "--dtype",
                dtype,
                "--max-tokens",
                "8",
                "--max-denoising-steps",
                "2",
                "--bound",
                "1",
            ],
            ["fuse", "--model", folder / "toy", "--adapter", tuned, folder / "fused"],
            ["fuse", "--model", folder / "4bit", "--adapter", tuned, folder / "packed"],
        ):
            done = CliRunner().invoke(main, [str(one) for one in command])
            assert done.exit_code == 0, (command, done.output, done.stderr)
        loaded(dtype, folder, adapter=tuned)
        return
    model = small(dtype)
    random = mx.random.key(0)
    paths = target_paths(model, ("attention", "mlp", "self-conditioning", "experts", "router"))
    add_adapter(model, paths, 2, 2.0, 0.0, False, random)
    one_step(model)
    nn.quantize(packed := small(dtype), 64, 4)
    add_adapter(packed, target_paths(packed, ("attention", "mlp")), 2, 2.0, 0.0, True, random)
    one_step(packed)


def conversions(dtype: str, folder: Path) -> None:
    """Checkpoints of every recipe, checked as they are written, loaded packed and unpacked."""
    from mlx_dgemma.convert.recipes import RECIPES

    whole = dtype == "float32"
    for recipe in RECIPES if whole else ("4bit",):
        convert(folder / "toy", folder / recipe, recipe, dtype, verify=whole and recipe == "4bit")
    (folder / "prompts.txt").write_text("Say it.\n")
    rounded = {"rounding": "gptq+dwq", "prompts": folder / "prompts.txt"}
    with patch.object(rounding, "STATES", 2), patch.object(dwq, "EPOCHS", 1):
        convert(folder / "toy", folder / "rounded", "3bit", dtype, **rounded)
    packed, unpacked = (
        mlx_dgemma.load(folder / "4bit", dtype=dtype, dequantize=unpack, ignore_memory=True) for unpack in (False, True)
    )
    one_step(packed.model)
    one_step(unpacked.model)
    copy_of_tied_weights(folder / "4bit", folder / "tied")
    mlx_dgemma.load(folder / "tied", dtype=dtype, dequantize=False, ignore_memory=True)


def copy_of_tied_weights(packed: Path, folder: Path) -> None:
    """A checkpoint whose output projection is a copy of its embedding, unpacked."""
    shutil.copytree(packed, folder)
    (file,) = folder.glob("*.safetensors")
    arrays = mx.load(str(file))
    name = next(one for one in arrays if one.endswith("embed_tokens.scales")).removesuffix(".scales")
    quantization = json.loads((folder / "config.json").read_text())["quantization"]
    own = {**quantization, **quantization.get(name, {})}
    how = {key: own[key] for key in ("group_size", "bits", "mode") if key in own}
    parts = [arrays.get(f"{name}.{part}") for part in ("weight", "scales", "biases")]
    arrays["lm_head.weight"] = mx.dequantize(*parts, **how)
    mx.save_safetensors(str(file), arrays)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


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
