"""Paths of training, adapters and conversions, as `metal_paths.py` has the others."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from click.testing import CliRunner
from metal_toys import loaded, one_step, small
from mlx.optimizers import clip_grad_norm
from mlx.utils import tree_map
from support import random_tokens

import mlx_dgemma
from mlx_dgemma.adapters.deltas import add_adapter, add_denoising_adapter, target_paths
from mlx_dgemma.cli.main import main
from mlx_dgemma.convert.conversion import convert
from mlx_dgemma.convert.rounding import groups, layers
from mlx_dgemma.convert.rounding import run as rounding
from mlx_dgemma.tune.config import TrainerConfig
from mlx_dgemma.tune.objective import VARIANTS, Batch, draw_noise
from mlx_dgemma.tune.quick.config import DistillConfig
from mlx_dgemma.tune.quick.distill import distill
from mlx_dgemma.tune.quick.loss import Distillation, StateBatch
from mlx_dgemma.tune.quick.replay import Trajectory
from mlx_dgemma.tune.trainer import Trainer
from mlx_dgemma.tune.workers import loss_and_gradients


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
        engine = loaded(dtype, folder)
        engine.builder.options = replace(engine.builder.options, max_denoising_steps=4)
        list(distill(engine, TrainerConfig(rank=2, steps=2, layers=1), plan))
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
    rounded = {"rounding": "gptq", "prompts": folder / "prompts.txt"}
    once = patch.object(layers, "DAMPINGS", (0.1,)), patch.object(groups, "SHRINKS", (0.5,))
    with patch.object(rounding, "STATES", 2), once[0], once[1]:
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
