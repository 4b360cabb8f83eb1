"""The training loss and its gradients beside Transformers', float32, on the same noise.

    python bench/objective.py PATH [--write tests/data/objective.safetensors]

PATH is a checkpoint as Transformers reads it. Cases: padded texts and a picture, with and without self-conditioning,
by two objectives. Needs torch and transformers. Printed are the losses, and the largest difference of three weights'
gradients over the largest gradient. `--write` keeps what the tests compare with, every eighth row of each gradient.
"""

import argparse
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from mlx.utils import tree_flatten
from report import finish, machine, table
from transformers import DiffusionGemmaForBlockDiffusion

import mlx_dgemma
from mlx_dgemma.tune.objective import VARIANTS, Batch, Noise, draw_noise, loss

DATA = Path(__file__).parent.parent / "tests" / "data"
WEIGHTS = (
    "model.decoder.layers.1.self_attn.k_proj.weight",
    "model.decoder.layers.2.experts.down_proj.weight",
    "model.decoder.self_conditioning.gate_proj.weight",
)
CASES = {
    "text": ("google", [True, False, True]),
    "text_plain": ("google", [False, False, False]),
    "text_shifted": ("megatron-reweighted-loo", [False, True, True]),
    "text_by_token": ("nemo", [True, False, False]),
    "image": ("google", [True]),
    "image_plain": ("google", [False]),
}


def batch_of(name: str, model) -> tuple[Batch, dict[str, np.ndarray]]:
    """Random tokens, or the reference prompt with a picture; canvases that end at different places."""
    random, canvas = np.random.default_rng(7), model.config.canvas_length
    seen: dict[str, np.ndarray] = {}
    if name.startswith("image"):
        held = {key: np.array(one) for key, one in mx.load(str(DATA / "image.safetensors")).items()}
        seen = {key: held[key] for key in ("pixel_values", "image_position_ids")}
        seen["pixel_values"] = seen["pixel_values"].astype(np.float32) / 255
        tokens = held["input_ids"].astype(np.int32)
    else:
        tokens = random.integers(200, 2000, (3, 130)).astype(np.int32)  # longer than the sliding window
    real = np.ones(tokens.shape, bool)
    for row, pad in zip(real[1:], (3, 101)):
        row[:pad] = False
    clean = random.integers(200, 2000, (len(tokens), canvas)).astype(np.int32)
    supervised = np.arange(canvas) < np.array([[canvas], [20], [3]])[: len(tokens)]
    features = [model.encode_images(tuple(map(mx.array, seen.values())))] if seen else []
    return Batch(tokens, real, clean, supervised, features), seen


def masks(model, tokens: torch.Tensor, real: torch.Tensor, types: torch.Tensor) -> dict[str, torch.Tensor]:
    """The encoder's masks as `generate` makes them: a plain forward leaves out that pictures see themselves whole."""
    embedded = model.get_input_embeddings()(tokens)
    # The first None is the cache, whose name differs between versions, the second the position ids.
    return model.model.encoder.create_masks_for_generate(
        model.config, embedded, real, None, None, mm_token_type_ids=types
    )


def theirs(model, batch: Batch, noise: Noise, objective, seen: dict) -> tuple[list[float], list[np.ndarray]]:
    """Losses (total, canvas, encoder) and gradients by Transformers, in the straightest way."""
    tokens, real, clean = (torch.from_numpy(np.array(a)).long() for a in (batch.tokens, batch.mask, batch.canvas))
    noisy = torch.from_numpy(np.array(noise.canvas)).long()
    t, counts = torch.from_numpy(np.array(noise.t)), torch.from_numpy(batch.supervised).float()
    more = {key: torch.from_numpy(one) for key, one in seen.items()}
    held = (tokens == model.config.image_token_id).long()
    if more:
        more["mm_token_type_ids"] = held
    places = (real.cumsum(1) - 1).clamp(min=0)
    seen_by = masks(model, tokens, real, held)
    told = {"input_ids": tokens, "attention_mask": seen_by, "position_ids": places, **more}
    behind = places[:, -1:] + 1 + torch.arange(clean.shape[1])
    whole_mask = torch.cat([real, torch.ones_like(clean)], 1)
    asked = {"decoder_input_ids": noisy, "decoder_position_ids": behind, "decoder_attention_mask": whole_mask}
    model.zero_grad()
    with torch.no_grad():
        first = model(**told, **asked).logits
    picked = torch.from_numpy(noise.conditioned)
    logits = model(**told, **asked, self_conditioning_logits=first, self_conditioning_mask=picked).logits
    if objective.leave_one_out:
        vocab = logits.shape[-1]
        by = torch.log(1 + vocab * (1 - t) / t)
        logits = logits + torch.nn.functional.one_hot(noisy, vocab) * by[:, None, None]
    lost = torch.nn.functional.cross_entropy(logits.transpose(1, 2), clean, reduction="none")
    if objective.reweighted:
        lost = lost * (1 / (1 - t)).clamp(max=objective.clip)[:, None]
    together = torch.cat([tokens, clean], 1)
    types = torch.cat([held, torch.zeros_like(clean)], 1)
    told.update(input_ids=together, attention_mask=masks(model, together, whole_mask, types))
    told.update(position_ids=torch.cat([places, behind], 1))
    if more:
        told["mm_token_type_ids"] = types
    states = model.model.encoder(**told).last_hidden_state
    cap = model.final_logit_softcapping
    ahead = cap * torch.tanh(model.lm_head(states) / cap)
    next_lost = torch.nn.functional.cross_entropy(ahead[:, :-1].transpose(1, 2), together[:, 1:], reduction="none")
    next_counts = torch.cat([real * (1 - held), counts], 1)[:, 1:] * whole_mask[:, :-1]

    def mean(values, over):
        if objective.by_token:
            return (values * over).sum() / over.sum()
        return ((values * over).sum(1) / over.sum(1)).mean()

    canvas, encoder = mean(lost, counts), mean(next_lost, next_counts)
    total = canvas + objective.encoder_weight * encoder
    total.backward()
    named = dict(model.named_parameters(remove_duplicate=False))
    found = [named[name.replace("experts.down_proj.weight", "experts.down_proj")].grad.numpy() for name in WEIGHTS]
    return [one.item() for one in (total, canvas, encoder)], found


def ours(model, batch: Batch, noise: Noise, objective) -> tuple[list[float], list[np.ndarray]]:
    """The same by `tune.objective`."""
    asked = nn.value_and_grad(model, lambda: tuple(loss(model, batch, noise, objective)))
    losses, gradients = asked()
    flat = dict(tree_flatten(gradients))
    return [one.item() for one in losses], [np.array(flat[name]) for name in WEIGHTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--write", metavar="FILE")
    args = parser.parse_args()
    found = machine("torch", "transformers")
    reference = DiffusionGemmaForBlockDiffusion.from_pretrained(args.path, dtype=torch.float32)
    model = mlx_dgemma.load(args.path, dtype="float32").model
    rows, kept = [], {}
    for name, (variant, conditioned) in CASES.items():
        objective = VARIANTS[variant]
        batch, seen = batch_of(name, model)
        noise = draw_noise(batch, objective, model.config.text.vocab_size, mx.random.key(3))
        noise = noise._replace(conditioned=np.array(conditioned))
        losses, gradients = theirs(reference, batch, noise, objective, seen)
        own, mine = ours(model, batch, noise, objective)
        gaps = [float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-9)) for a, b in zip(gradients, mine)]
        rows.append([name, variant, *losses, max(abs(a - b) for a, b in zip(losses, own)), *gaps])
        kept |= {f"{name}.losses": np.array(losses), f"{name}.t": np.array(noise.t)}
        kept |= {f"{name}.canvas": batch.canvas, f"{name}.noisy": np.array(noise.canvas)}
        kept |= {f"{name}.{i}": one.reshape(-1, one.shape[-1])[::8] for i, one in enumerate(gradients)}
        if not seen:
            kept[f"{name}.tokens"] = batch.tokens
    table(["case", "objective", "loss", "canvas", "encoder", "gap", "k_proj", "experts", "self-conditioning"], rows)
    if args.write:
        mx.save_safetensors(args.write, {key: mx.array(one) for key, one in kept.items()})
    finish("objective", **found, rows=rows)


if __name__ == "__main__":
    main()
