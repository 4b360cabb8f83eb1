"""Random small configurations through Transformers: makes the outputs that `tests/model/test_random_configs.py` holds.

    python bench/random_configs.py                   # writes tests/data/random_configs.safetensors
    python bench/random_configs.py --seeds 100 400   # compares these seeds and stores nothing

Needs torch and transformers. A checkpoint in Hugging Face's layout is written for every seed, and each side reads its
config.json in its own way. Weights are not stored: they depend on the seed, and on a tensor's name.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
import transformers
from mlx.utils import tree_flatten
from safetensors.numpy import save_file
from transformers import DiffusionGemmaForBlockDiffusion

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from stored_configs import FILE, TEMPERATURE, computed, kept, model_of

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
COUNT, BOUND = 40, 1e-4
IMAGE = {"boi_token_id": 5, "eoi_token_id": 6, "image_token_id": 7}
LAYERS = "sliding_attention", "full_attention"


def config_of(seed: int) -> dict:
    """config.json of a small model; each number is drawn by itself."""
    draw = random.Random(seed)
    layers = [draw.choice(LAYERS) for _ in range(draw.randint(1, 5))]
    kv, kv_full = draw.choice([1, 2, 3]), draw.choice([1, 2, 3])
    heads = kv * kv_full * draw.choice([1, 2])
    dim, dim_full = draw.choice([4, 8, 10, 16]), draw.choice([4, 8, 14, 16, 20])
    experts = draw.randint(1, 6)
    text = {
        "model_type": "diffusion_gemma_text",
        "vocab_size": draw.choice([40, 57, 80]),
        "hidden_size": draw.choice([16, 24, 36, 48]),
        "intermediate_size": draw.choice([16, 20, 40]),
        "num_hidden_layers": len(layers),
        "layer_types": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": dim,
        "sliding_window": draw.choice([2, 3, 5, 8, 13]),
        "num_experts": experts,
        "top_k_experts": draw.randint(1, experts),
        "moe_intermediate_size": draw.choice([8, 12, 20]),
        "rms_norm_eps": draw.choice([1e-6, 1e-5, 1e-3]),
        "final_logit_softcapping": draw.choice([3.0, 10.0, 30.0]),
        "max_position_embeddings": 128,
        "use_bidirectional_attention": draw.choice(["vision", "vision", None]),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": draw.choice([100.0, 1e4])},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": draw.choice([1e3, 1e6]),
                "partial_rotary_factor": draw.choice([0.25, 0.33, 0.5, 0.8, 1.0]),
            },
        },
    }
    if draw.random() < 0.5:
        text |= {"global_head_dim": dim_full, "num_global_key_value_heads": kv_full}
    else:  # as newer versions of Transformers save it: what differs from the keys above
        own = {"head_dim": dim_full, "num_key_value_heads": kv_full}
        own = {name: value for name, value in own.items() if value != text[name]}
        layers[-1] = LAYERS[1]
        text["per_layer_config"] = {str(i): own for i, kind in enumerate(layers) if kind == LAYERS[1]}
    side = draw.choice([1, 2])
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": 4 * 4 * side,
        "intermediate_size": draw.choice([16, 24]),
        "num_hidden_layers": draw.randint(1, 2),
        "num_attention_heads": 4,
        "num_key_value_heads": draw.choice([2, 4]),
        "head_dim": 4 * side,
        "patch_size": draw.choice([2, 4]),
        "pooling_kernel_size": draw.choice([2, 3]),
        "position_embedding_size": 64,
        "standardize": draw.random() < 0.5,
        "use_clipped_linears": draw.random() < 0.5,
        "rope_parameters": {"rope_type": "axial", "rope_theta": draw.choice([10.0, 100.0])},
    }
    return {
        "model_type": "diffusion_gemma",
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "canvas_length": draw.choice([3, 4, 7, 12]),
        **IMAGE,
        "text_config": text,
        "vision_config": vision,
    }


def given_of(raw: dict, seed: int) -> dict[str, np.ndarray]:
    """A prompt, a canvas and a block behind it; a picture in two of five, left padding in the others."""
    draw = np.random.RandomState(seed)
    vocab, canvas = raw["text_config"]["vocab_size"], raw["canvas_length"]

    def tokens(count: int) -> np.ndarray:
        return draw.randint(8, vocab, (1, count)).astype(np.int32)

    length = int(draw.randint(4, 24))
    found = {"input_ids": tokens(length), "canvas": tokens(canvas), "committed": tokens(canvas)}
    if seed % 5 < 2:
        tower = raw["vision_config"]
        pooling, patch = tower["pooling_kernel_size"], tower["patch_size"]
        columns, rows = draw.randint(1, 4, 2)
        y, x = np.divmod(np.arange(columns * rows * pooling**2), columns * pooling)
        found["pixels"] = draw.random_sample((1, len(x), 3 * patch**2)).astype(np.float32)
        found["positions"] = np.stack([x, y], axis=-1)[None].astype(np.int32)
        picture = np.full((1, columns * rows), IMAGE["image_token_id"], np.int32)
        found["input_ids"] = np.concatenate([found["input_ids"], picture, tokens(2)], axis=1)
    else:
        found["mask"] = (np.arange(length)[None] >= [[int(draw.randint(1, length))], [0]]).astype(np.int32)
    return found


def write(folder: Path, raw: dict, seed: int) -> None:
    """The checkpoint of a configuration in Hugging Face's layout, whose experts are bare tensors."""
    tensors = {
        name.removesuffix(".weight") if ".experts." in name else name: np.array(array)
        for name, array in tree_flatten(model_of(raw, seed).parameters())
    }
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def theirs(folder: Path, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `computed` of the tests gives, by Transformers."""
    model, told = DiffusionGemmaForBlockDiffusion.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not told["unexpected_keys"] and not told["mismatched_keys"], told
    assert all(name.startswith(("lm_head", "model.encoder.language_model")) for name in told["missing_keys"]), told
    model.eval()
    tokens, canvas, block = (torch.tensor(given[name]).long() for name in ("input_ids", "canvas", "committed"))
    pictures = {}
    if "pixels" in given:
        pictures = {
            "pixel_values": torch.tensor(given["pixels"]),
            "image_position_ids": torch.tensor(given["positions"]).long(),
        }

    def run(tokens: torch.Tensor, canvas: torch.Tensor, **more):
        if pictures:  # a plain forward pass would have a picture causal
            spans = (tokens == model.config.image_token_id).long()
            empty, places = torch.empty((*tokens.shape, 0)), torch.arange(tokens.shape[1])[None]
            more["attention_mask"] = model.model.encoder.create_masks_for_generate(
                model.config, empty, torch.ones_like(tokens), None, places, mm_token_type_ids=spans
            )
        return model(input_ids=tokens, decoder_input_ids=canvas, **pictures, **more)

    first = run(tokens, canvas)
    found = {"hidden": first.encoder_last_hidden_state, "logits": first.logits}
    found["conditioned"] = run(tokens, canvas, self_conditioning_logits=first.logits / TEMPERATURE).logits
    found["second"] = run(torch.cat([tokens, block], dim=1), canvas.flip(1)).logits
    if "mask" in given:
        mask = torch.tensor(given["mask"]).long()
        rows, canvases = torch.cat([tokens, tokens.flip(1)]), torch.cat([canvas, canvas.flip(1)])
        found["padded"] = run(
            rows,
            canvases,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            decoder_attention_mask=torch.cat([mask, torch.ones_like(canvases)], dim=1),
            decoder_position_ids=mask.sum(1, keepdim=True) + torch.arange(canvas.shape[1]),
        ).logits
    return {name: kept(one.numpy()) for name, one in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs=2, help="the first and the one behind the last")
    seeds = parser.parse_args().seeds
    cases, arrays, worst = [], {}, 0.0
    for number, seed in enumerate(range(*(seeds or (0, COUNT)))):
        raw = config_of(seed)
        given = given_of(raw, seed)
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), raw, seed)
            expected = theirs(Path(folder), given)
        found = computed(model_of(raw, seed), {name: mx.array(array) for name, array in given.items()})
        gaps = {name: float(np.abs(found[name] - expected[name]).max()) for name in expected}
        worst = max(worst, *gaps.values())
        print(seed, " ".join(f"{name} {gap:.1e}" for name, gap in gaps.items()), flush=True)
        cases.append({"seed": seed, "config": raw})
        for part, held in (("given", given), ("expected", expected)):
            arrays |= {f"{number:02}.{part}.{name}": np.ascontiguousarray(one) for name, one in held.items()}
    print(f"{len(cases)} configurations, transformers {transformers.__version__}: off by {worst:.1e} at most")
    if seeds is None and worst < BOUND:
        save_file(arrays, FILE, {"cases": json.dumps(cases, separators=(",", ":"))})


if __name__ == "__main__":
    main()
