"""Adapters between this package and PEFT on Transformers; needs torch, transformers and peft.

    python bench/adapters.py check CHECKPOINT             # ours there: written here, computed by PEFT
    python bench/adapters.py make CHECKPOINT tests/data   # theirs here: the tests' adapters, saved by PEFT

CHECKPOINT is the demo as it was released, in Hugging Face's layout. Everything is in float32. `check` prints how far
the two are apart, and how far the adapter moves Transformers' logits: a gap says little where nothing moves.
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from report import finish, machine, table
from safetensors.torch import load_file, save_file
from transformers import DiffusionGemmaForBlockDiffusion

from mlx_dgemma.adapters import peft
from mlx_dgemma.adapters.deltas import Adapter, Delta
from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma

BOUND = 1e-4
TEMPERATURE = 0.8  # between the first step and the one that it conditions
EVERY = 16  # positions of the canvas that the tests' files keep
PROMPT, CANVAS = 12, 64
EXCLUDED = r".*(vision_tower|embed_vision).*"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# {name: (PEFT's settings, dtype of the file)}
MADE = {
    "peft_patterns": (
        {
            "r": 2,
            "lora_alpha": 3,
            "use_rslora": True,
            "target_modules": r"model\.(encoder\.language_model|decoder)\.(layers\.[05]|self_conditioning)\..+_proj",
            "rank_pattern": {r"decoder\.layers\.\d+\.mlp\.down_proj": 3, "q_proj": 1},
            "alpha_pattern": {r"language_model\.layers\.5\..*": 5, r"self_conditioning\.up_proj": 1.5},
        },
        torch.float32,
    ),
    "peft_dora": (
        {
            "r": 2,
            "lora_alpha": 4,
            "use_dora": True,
            "target_modules": LINEAR,
            "layers_to_transform": [1],
            "exclude_modules": EXCLUDED,
        },
        torch.bfloat16,
    ),
    "peft_experts": (
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["layers.2.router.proj"],
            "target_parameters": ["layers.2.experts.down_proj", "layers.2.experts.gate_up_proj"],
            "exclude_modules": EXCLUDED,
        },
        torch.float16,
    ),
}
TEXT = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "router.proj")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
SELF_CONDITIONING = tuple(f"model.decoder.self_conditioning.{part}_proj" for part in ("gate", "up", "down"))
VISION = (
    "model.encoder.vision_tower.patch_embedder.input_proj",
    "model.encoder.vision_tower.encoder.layers.1.self_attn.v_proj.linear",
    "model.encoder.vision_tower.encoder.layers.2.mlp.up_proj.linear",
    "model.encoder.embed_vision.embedding_projection",
)
Output = dict[str, np.ndarray]


def theirs(checkpoint: Path) -> DiffusionGemmaForBlockDiffusion:
    """Transformers' model, anew: PEFT changes it in place."""
    return DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint, dtype=torch.float32).eval()


@torch.no_grad()
def their_output(model: torch.nn.Module, tokens: np.ndarray, canvas: np.ndarray, pictures: dict) -> Output:
    """Hidden states [1, L, H] of the encoder, and logits [1, C, V] of a first step and of one conditioned on it."""
    given = {"input_ids": tokens, "decoder_input_ids": canvas, **pictures}
    given = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in given.items()}
    if pictures:
        given["attention_mask"] = picture_masks(model, given["input_ids"])
    first = model(**given)
    second = model(**given, self_conditioning_logits=first.logits / TEMPERATURE)
    found = {
        "encoder_hidden": first.encoder_last_hidden_state,
        "logits": first.logits,
        "logits_conditioned": second.logits,
    }
    return {name: tensor.numpy() for name, tensor in found.items()}


def picture_masks(model: torch.nn.Module, tokens: torch.Tensor) -> dict:
    """The encoder's masks as generation has them: a picture sees itself whole. A plain forward pass has it causal."""
    return model.get_base_model().model.encoder.create_masks_for_generate(
        model.config,
        torch.empty((*tokens.shape, 0)),  # embeddings
        torch.ones_like(tokens),  # attention mask
        None,  # the cache, whose name differs between versions
        torch.arange(tokens.shape[1])[None],  # position ids
        mm_token_type_ids=(tokens == model.config.image_token_id).long(),
    )


def changed(checkpoint: Checkpoint, deltas: dict[str, Delta]) -> DiffusionGemma:
    """Our model with deltas in its weights."""
    model = build(checkpoint, "float32")
    modules = dict(model.named_modules())
    for path, delta in deltas.items():
        weight = modules[path].weight + delta.scale * (delta.b @ delta.a)
        if delta.magnitude is not None:
            weight = weight * (delta.magnitude / mx.linalg.norm(weight, axis=-1))[:, None]
        modules[path].weight = weight
    return model


def our_output(
    checkpoint: Checkpoint, adapter: Adapter, tokens: np.ndarray, canvas: np.ndarray, pictures: dict
) -> Output:
    """What `their_output` gives, from two copies of our model with the two modes' deltas."""
    encoder, decoder = changed(checkpoint, adapter.encode), changed(checkpoint, adapter.denoise)
    prefix = encoder.new_prefix()
    images = (mx.array(pictures["pixel_values"]), mx.array(pictures["image_position_ids"])) if pictures else None
    hidden = encoder.encode(mx.array(tokens.astype(np.int32)), prefix, images=images)
    ids = mx.array(canvas.astype(np.int32))
    first = decoder.logits(decoder.denoise(ids, prefix))
    second = decoder.logits(decoder.denoise(ids, prefix, decoder.condition(first / TEMPERATURE)))
    return {
        "encoder_hidden": np.array(hidden),
        "logits": np.array(first),
        "logits_conditioned": np.array(second),
    }


def gaps(a: Output, b: Output) -> dict[str, float]:
    return {name: float(np.abs(a[name] - b[name]).max()) for name in a}


def inputs(seed: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [1, 12] and a canvas [1, 64], int64."""
    random = np.random.default_rng(seed)
    return random.integers(20, vocabulary, (1, PROMPT)), random.integers(0, vocabulary, (1, CANVAS))


def make(args: argparse.Namespace) -> None:
    """Let PEFT save random adapters, and keep what Transformers computes with them."""
    found, rows = machine("torch", "transformers", "peft"), []
    for seed, (name, (settings, dtype)) in enumerate(MADE.items()):
        model = get_peft_model(theirs(args.checkpoint), LoraConfig(**settings)).eval()
        randomize(model, dtype, seed)
        folder = args.out / name
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        weights = folder / peft.WEIGHTS
        save_file({key: a.to(dtype) for key, a in load_file(weights).items()}, weights, {"format": "pt"})
        config = json.loads((folder / peft.CONFIG).read_text())
        config["base_model_name_or_path"] = "dgemma-tiny-2"  # no path of this machine
        config = {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}
        (folder / peft.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        tokens, canvas = inputs(seed, model.config.text_config.vocab_size)
        output = their_output(model, tokens, canvas, {})
        with model.disable_adapter():
            plain = their_output(model, tokens, canvas, {})
        kept = {"input_ids": tokens.astype(np.int32), "canvas": canvas.astype(np.int32)}
        kept["encoder_hidden"] = output["encoder_hidden"]
        kept.update({key: output[key][:, ::EVERY] for key in ("logits", "logits_conditioned")})
        file = args.out / f"{name}.safetensors"
        save_file({key: torch.from_numpy(np.ascontiguousarray(a)) for key, a in kept.items()}, file)
        rows.append([name, weights.stat().st_size, file.stat().st_size, *gaps(output, plain).values()])
    header = ["adapter", "bytes", "reference", "hidden moved", "logits moved", "conditioned moved"]
    table(header, rows)
    finish("adapters make", **found, rows=[dict(zip(header, row)) for row in rows])


@torch.no_grad()
def randomize(model: PeftModel, dtype: torch.dtype, seed: int) -> None:
    """Deltas about half as large as their weights, rounded to what the file will hold."""
    random = torch.Generator().manual_seed(seed)

    def draw(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=random)

    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        weight = module.get_param() if hasattr(module, "get_param") else module.get_base_layer().weight
        size = 0.5 * weight.std() / (module.scaling["default"] * module.r["default"] ** 0.5)
        a.copy_(draw(a).to(dtype))
        b.copy_((draw(b) * size).to(dtype))
        for one in module.lora_magnitude_vector.values():
            one.weight.mul_(1 + 0.2 * draw(one.weight)).copy_(one.weight.to(dtype))


def random_adapters(shapes: dict[str, tuple[int, ...]]) -> dict[str, Adapter]:
    """What `write` can be asked for, by name."""
    random = np.random.default_rng(0)

    def one(path: str, rank: int, scale: float, dora: bool = False) -> Delta:
        *experts, out, inputs = shapes[f"{path}.weight"]
        a, b = random.normal(size=(*experts, rank, inputs)), random.normal(size=(*experts, out, rank))
        magnitude = mx.array(random.uniform(0.5, 1.5, out).astype(np.float32)) if dora else None
        b *= 0.02 / (scale * rank**0.5)
        return Delta(mx.array(a.astype(np.float32)), mx.array(b.astype(np.float32)), scale, magnitude)

    def layers(numbers: range, parts: tuple[str, ...]) -> list[str]:
        return [f"model.decoder.layers.{number}.{part}" for number in numbers for part in parts]

    def plain(paths: list[str], **kind: bool) -> dict[str, Delta]:
        return {path: one(path, 2, 1.5, **kind) for path in paths}

    def mixed(paths: list[str]) -> dict[str, Delta]:
        return {path: one(path, 1 + i % 3, (0.5, 2, 1 / 3, 2**-0.5)[i % 4]) for i, path in enumerate(paths)}

    text, own = layers(range(6), TEXT), list(SELF_CONDITIONING)
    shared = plain(text)
    return {
        "shared": Adapter(shared, {**shared, **plain(own)}),
        "one layer of one mode": Adapter({}, plain(layers(range(3, 4), TEXT[:1]))),
        "ranks and scales": Adapter(mixed(text[::2]), mixed([*text[::3], *own])),
        "DoRA": Adapter(plain(text, dora=True), plain([*text[:7], *own], dora=True)),
        "experts": Adapter(mixed(layers(range(6), EXPERTS)), mixed([*layers(range(6), EXPERTS), *text])),
        "some experts": Adapter(plain(layers(range(1), EXPERTS[:1])), plain(layers(range(2), EXPERTS[1:]))),
        "vision": Adapter({**plain(list(VISION)), **plain(text[:3])}, plain(text[3:5])),
    }


def check(args: argparse.Namespace) -> None:
    """Write random adapters, load them with PEFT, and compare."""
    found, rows = machine("torch", "transformers", "peft"), []
    ours = Checkpoint.open(args.checkpoint)
    seen = mx.load(str(args.pictures))
    for seed, (name, adapter) in enumerate(random_adapters(ours.shapes).items()):
        tokens, canvas = inputs(seed, ours.config.text.vocab_size)
        pictures = {}
        if name == "vision":
            tokens, canvas = (np.array(seen[key]).astype(np.int64) for key in ("input_ids", "canvas"))
            pictures["pixel_values"] = np.array(seen["pixel_values"]).astype(np.float32) / 255
            pictures["image_position_ids"] = np.array(seen["image_position_ids"]).astype(np.int64)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            peft.write(adapter, folder, str(args.checkpoint))
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                model = PeftModel.from_pretrained(theirs(args.checkpoint), folder).eval()
        wrapped = sum(isinstance(module, LoraLayer) for module in model.modules())
        asked = len(adapter.encode) + len(adapter.denoise)
        # Patterns of parameters it calls unmatched, and uses them: it looks for them among modules.
        told = [str(one.message) for one in told if "missing adapter keys" in str(one.message)]
        if wrapped != asked or told:
            raise SystemExit(f"{name}: PEFT wraps {wrapped} modules for {asked} deltas; {told}")
        output = their_output(model, tokens, canvas, pictures)
        apart = gaps(our_output(ours, adapter, tokens, canvas, pictures), output)
        with model.disable_adapter():
            moved = gaps(their_output(model, tokens, canvas, pictures), output)
        rows.append([name, asked, *(f"{value:.1e}" for value in apart.values()), moved["logits_conditioned"]])
        rows[-1].append("yes" if max(apart.values()) < BOUND else "NO")
    header = ["adapter", "deltas", "hidden", "logits", "conditioned", "logits moved", f"below {BOUND}"]
    table(header, rows)
    finish("adapters check", **found, rows=[dict(zip(header, row)) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("check")
    command.set_defaults(run=check)
    command.add_argument("checkpoint", type=Path)
    default = Path(__file__).parent.parent / "tests" / "data" / "image.safetensors"
    command.add_argument("--pictures", type=Path, default=default, help="a prompt with a picture, as tests/data has")
    command = commands.add_parser("make")
    command.set_defaults(run=make)
    command.add_argument("checkpoint", type=Path)
    command.add_argument("out", type=Path, help="a folder; files in it are replaced")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
