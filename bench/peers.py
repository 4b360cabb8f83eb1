"""Other runtimes, each measured through its own code: mlx-vlm, mlx-lm and Transformers. Imported only when asked for.

Steps: random weights at a shape, the peer's entropy-bound loop. Answers: a checkpoint, the peer's default sampler.
"""

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from meter import MLX, Memory, Meter

from mlx_dgemma.check.shapes import fill, quantize

COMPUTED = ("DiffusionGemmaTextRotaryEmbedding", "DiffusionGemmaTextScaledWordEmbedding")  # buffers no file holds
NEVER = 1e-30  # nats: no canvas's mean entropy is below it, so the stop rule is never met
Answer = Callable[[dict, int], tuple[str, int]]  # (case, seed) -> (text with markers, positions denoised)


def mlx_vlm_model(raw: dict, weights: list, recipe: str | None) -> nn.Module:
    """mlx-vlm's model holding our arrays."""
    from mlx_vlm.models.diffusion_gemma.config import ModelConfig
    from mlx_vlm.models.diffusion_gemma.diffusion_gemma import Model

    model = Model(ModelConfig.from_dict(raw))
    quantize(model, recipe)
    model.load_weights(weights)
    mx.eval(model.parameters())
    return model


def mlx_lm_seconds(raw: dict, dtype: mx.Dtype, recipe: str | None, prompt: mx.array, tokens: int) -> list[float]:
    """Seconds of each token by mlx-lm's own loop, at temperature 0, of plain Gemma 4 at the same shape.

    Weights are random. With a recipe all matrices have 4 bits, in groups of 64.
    """
    from mlx_lm.generate import generate_step
    from mlx_lm.models.gemma4_text import Model, ModelArgs

    text = {key: value for key, value in raw["text_config"].items() if key != "model_type"}
    more = {"enable_moe_block": True, "attention_k_eq_v": True, "num_kv_shared_layers": 0, "use_double_wide_mlp": False}
    model = Model(ModelArgs.from_dict({**text, **more, "hidden_size_per_layer_input": 0}))
    fill(model, dtype)
    if recipe:
        nn.quantize(model, 64, 4)
    mx.eval(model.parameters())
    taken, started = [], time.perf_counter()
    for _ in generate_step(prompt[0], model, max_tokens=tokens):
        taken.append(time.perf_counter() - started)
        started = time.perf_counter()
    return taken[4:]


def mlx_vlm_step(model: nn.Module, prompt: mx.array, steps: int) -> dict:
    """One prefill and one canvas: the parts of mlx-vlm's entropy-bound loop, in its order."""
    from mlx_vlm.generate import diffusion as loop

    vocab, length = model.config.text_config.vocab_size, model.config.canvas_length
    meter = Meter()
    cache = model.diffusion_prefill_cache(prompt, cache=model.make_cache(), prefill_step_size=2048, chunk_prefill=True)
    mx.eval([c.state for c in cache])
    kv = sum(c.nbytes for c in cache)
    meter.prefilled(kv)
    context = model.diffusion_prepare_self_conditioning()
    canvas = loop._diffusion_initialize_canvas(1, length, vocab, mx.int32)
    masks = model.diffusion_decoder_masks(canvas, cache)
    conditioning, history = None, []
    stopping = {"stability_threshold": 1, "confidence_threshold": NEVER}
    for step in range(steps, 0, -1):
        logits = model.diffusion_decoder_logits(
            canvas, cache=cache, self_conditioning=conditioning, decoder_attention_mask=masks
        )
        logits = logits / loop._diffusion_linear_temperature(step, steps, {"t_min": 0.4, "t_max": 0.8})
        best = mx.argmax(logits, axis=-1).astype(mx.int32)
        drawn = loop._diffusion_sample_canvas(logits, mx.int32, 1.0)
        accepted = loop._diffusion_entropy_transfer_mask(loop._diffusion_token_entropy(logits), 0.1)
        following = model.diffusion_self_conditioning(logits, context)
        canvas = mx.where(accepted, drawn, loop._diffusion_initialize_canvas(1, length, vocab, mx.int32))
        loop._diffusion_stable_and_confident(best, logits, history, stopping)
        conditioning = following
        mx.eval(canvas, best, conditioning)
        meter.stepped(kv)
    return meter.result()


@cache
def torch_device() -> str:
    """Where PyTorch is to run; on a CPU with one thread where more are slower, as on shared cores they can be."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    threads, found = torch.get_num_threads(), {}
    x = torch.randn(64, 512)
    weight = torch.randn(512, 512)
    for count in (threads, 1):
        torch.set_num_threads(count)
        started = time.perf_counter()
        for _ in range(20):
            torch.relu(x @ weight)
        found[count] = time.perf_counter() - started
    torch.set_num_threads(min(found, key=found.get))
    return "cpu"


def torch_memory() -> Memory | None:
    """The CUDA allocator's figures; PyTorch counts no bytes on a CPU."""
    import torch

    if torch_device() == "cpu":
        return None

    def settle() -> None:
        MLX.settle()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    cuda = torch.cuda
    return Memory(settle, cuda.memory_allocated, cuda.max_memory_allocated, cuda.reset_peak_memory_stats)


def transformers_model(raw: dict, dtype: str):
    """Transformers' model of random weights, made where it is to run: tied tensors once, and never in float32."""
    import torch
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    device, kind = torch_device(), getattr(torch, dtype)
    tower = {"model_type": "gemma4_vision", "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
    config = DiffusionGemmaConfig(**{**raw, "vision_config": tower})  # it has no model without a tower
    with torch.device("meta"):
        model = DiffusionGemmaForBlockDiffusion(config)
    stored, made = set(model.state_dict()), {}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            # Scalars of a checkpoint take the weights' dtype, rotary frequencies stay float32.
            kept = kind if f"{path}.{name}" in stored else buffer.dtype
            module._buffers[name] = torch.ones(buffer.shape, dtype=kept, device=device)
        parameters = {name: one for name, one in module._parameters.items() if one is not None}
        for name, one in parameters.items():
            if id(one) not in made:
                new = torch.ones(one.shape, dtype=kind, device=device)
                if one.ndim > 1:
                    new.normal_(std=one.shape[-1] ** -0.5)
                made[id(one)] = torch.nn.Parameter(new, requires_grad=False)
            module._parameters[name] = made[id(one)]
        if type(module).__name__ in COMPUTED:
            model._init_weights(module)
    return model.eval()


def cached_layers(given: dict) -> list:
    """The layers of the KV cache that a decoder call is given; its name changed with Transformers 5.24."""
    return (given["cache"] if "cache" in given else given["past_key_values"]).layers


def transformers_step(model, prompt: mx.array, steps: int) -> dict:
    """One prefill and one canvas of Transformers' own generate, a step being all between two decoder calls."""
    import torch

    device = torch_device()
    tokens = torch.tensor(np.asarray(prompt), dtype=torch.long, device=device)
    meter, calls = Meter(torch_memory()), [0]

    def before(module, args, kwargs) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        kv = sum(layer.keys.nbytes + layer.values.nbytes for layer in cached_layers(kwargs))
        meter.stepped(kv) if calls[0] else meter.prefilled(kv)
        calls[0] += 1

    hook = model.model.decoder.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with torch.no_grad():
            model.generate(
                tokens,
                max_new_tokens=model.config.canvas_length,
                max_denoising_steps=steps + 1,
                confidence_threshold=NEVER,
            )
    finally:
        hook.remove()
    return meter.result()


def prompt_text(tokenizer, case: dict) -> str:
    return tokenizer.apply_chat_template(
        case["messages"],
        tools=case["tools"],
        enable_thinking=case["enable_thinking"],
        add_generation_prompt=True,
        tokenize=False,
    )


def answer_text(tokenizer, tokens: list[int], case: dict) -> str:
    """The answer as `score` reads it: with markers where they are asked for, without a thought."""
    text = tokenizer.decode(tokens, skip_special_tokens=not case["tool_calls"] and not case["thinking"])
    return text.split("<channel|>")[-1]


class _Ends:
    """Stands in for mlx-vlm's stopping criteria and detokenizer: it notes the tokens up to an end."""

    def __init__(self):
        self.ends: set[int] = set()
        self.tokens: list[int] = []
        self.last_segment = ""
        self.detokenizer = self  # copied by mlx-vlm, but the list stays shared

    def add_eos_token_ids(self, ids: int | list[int]) -> None:
        self.ends.update([ids] if isinstance(ids, int) else ids)

    def __call__(self, token: int) -> bool:
        return token in self.ends

    def reset(self) -> None:
        self.tokens.clear()

    def add_token(self, token: int, **_) -> None:
        self.tokens.append(token)

    def finalize(self) -> None:
        pass


def mlx_vlm_answers(path: str) -> Answer:
    """mlx-vlm's own loop with its default sampler: confidence 0.9, temperature 0. Text alone."""
    from mlx_vlm.generate.diffusion import stream_diffusion_generate
    from mlx_vlm.utils import load_model
    from transformers import AutoTokenizer

    model, tokenizer, ends = load_model(Path(path)), AutoTokenizer.from_pretrained(path), _Ends()
    model.set_dtype(mx.float32)
    tokenizer.stopping_criteria = ends
    forward, positions = model.diffusion_decoder_logits, [0]

    def counted(canvas, *args, **kwargs):
        positions[0] += canvas.size
        return forward(canvas, *args, **kwargs)

    model.diffusion_decoder_logits = counted

    def answer(case: dict, seed: int) -> tuple[str, int]:
        mx.random.seed(seed)
        positions[0] = 0
        ids = tokenizer(prompt_text(tokenizer, case), add_special_tokens=False)["input_ids"]
        prompt = mx.array([ids], mx.int32)
        for _ in stream_diffusion_generate(
            model, ends, tokenizer, prompt, None, None, max_tokens=256, skip_special_token_ids=[]
        ):
            pass
        return answer_text(tokenizer, ends.tokens, case), positions[0]

    return answer


def transformers_answers(path: str) -> Answer:
    """Transformers' generate in float32, pictures and frames too."""
    import torch
    from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    device = torch_device()
    processor, tokenizer = Gemma4ImageProcessorPil.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(path, dtype=torch.float32).eval().to(device)
    forwards = [0]
    model.model.decoder.register_forward_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    ends = set(model.generation_config.eos_token_id)

    def encode(case: dict) -> dict:
        text, inputs = prompt_text(tokenizer, case), {}
        pictures = case["images"] or case["video"] or []
        if pictures:
            seen = processor(pictures, return_tensors="pt")
            spans = ["<|image>" + "<|image|>" * int(n) + "<image|>" for n in seen.pop("num_soft_tokens_per_image")]
            if case["video"]:
                stamped = " ".join(f"00:{i:02d} {span}" for i, span in enumerate(spans))
                text = text.replace("<|video|>", stamped)
            else:
                head, *tails = text.split("<|image|>")
                text = head + "".join(span + tail for span, tail in zip(spans, tails))
            inputs = dict(seen)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        if pictures:
            inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
        return {name: one.to(device) for name, one in {"input_ids": ids, **inputs}.items()}

    def answer(case: dict, seed: int) -> tuple[str, int]:
        torch.manual_seed(seed)
        inputs = encode(case)
        forwards[0] = 0
        out = model.generate(**inputs, max_new_tokens=256)
        out = getattr(out, "sequences", out)[0, inputs["input_ids"].shape[1] :].tolist()
        cut = next((i for i, token in enumerate(out) if token in ends), len(out))
        return answer_text(tokenizer, out[:cut], case), forwards[0] * model.config.canvas_length

    return answer
