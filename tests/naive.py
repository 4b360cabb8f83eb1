"""The whole model once more, in numpy and float64: one row, one pass, explicit masks, no cache. And its sample."""

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten


def two_levels(logits, key, tiles=4096, stride=64):
    """A sample [C] of logits [C, V]: Gumbel-max over the masses of tiles, then over the tokens of the tile that won.

    Blocks of `size * stride` tokens, where a tile holds `size` of them: tile j has j, j + stride, j + 2 * stride, ...
    """
    logits = np.array(logits, np.float64)
    count, vocab = logits.shape
    size = max(vocab // tiles, 1)
    block = size * stride
    held = [range(b + j, min(b + block, vocab), stride) for b in range(0, vocab, block) for j in range(stride)]
    tile_key, token_key = mx.random.split(key, 2)
    tile_noise = np.array(mx.random.gumbel((count, len(held)), key=tile_key))
    token_noise = np.array(mx.random.gumbel((count, size), key=token_key))
    drawn = []
    for z, outer, inner in zip(logits, tile_noise, token_noise):
        masses = [np.logaddexp.reduce(z[list(tile)]) if tile else -np.inf for tile in held]
        tokens = list(held[np.argmax(masses + outer)])
        drawn.append(tokens[np.argmax(z[tokens] + inner[: len(tokens)])])
    return drawn


def _norm(x, weight=1.0):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _rope(x, positions, theta, share):
    """Rotate-half over x [L, heads, D]; pairs from `share` of the head on stand still."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-2 * np.arange(half) / x.shape[-1])
    frequencies[int(share * half) :] = 0
    angles = positions[:, None, None] * frequencies
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)


class Naive:
    """Oracle for a `DiffusionGemma` without vision."""

    def __init__(self, model):
        self.config = model.config.text
        self.weights = {name: np.array(array, np.float64) for name, array in tree_flatten(model.parameters())}

    def get(self, name):
        return self.weights[f"model.{name}"]

    def logits(self, hidden):
        return 30 * np.tanh(hidden @ self.get("decoder.embed_tokens.weight").T / 30)

    def encode(self, tokens, spans=None):
        """Tokens [L] -> hidden [L, H] and each layer's keys and values of all L positions."""
        at = np.arange(len(tokens))
        kept = []
        causal = at[None] <= at[:, None]
        sliding = causal & (at[None] > at[:, None] - self.config.sliding_window)
        if spans is not None:
            whole = (spans[:, None] == spans[None]) & (spans[:, None] > 0)
            causal, sliding = causal | whole, sliding | whole
        h = self._embed(tokens)
        for i, kind in enumerate(self.config.layer_types):
            scalar = self.get(f"encoder.language_model.layers.{i}.layer_scalar")
            h, kv = self._layer(i, h, at, None, causal if kind == "full_attention" else sliding, scalar)
            kept.append(kv)
        return _norm(h, self.get("decoder.norm.weight")), kept

    def denoise(self, canvas, kept, conditioning=None):
        """Canvas [C] behind a prefix with these keys and values -> hidden [C, H]."""
        return self.denoise_narrow(canvas, kept, conditioning)[0]

    def denoise_narrow(self, canvas, kept, conditioning=None, behind=()):
        """A canvas's first tokens, whose other keys and values are `behind` -> hidden, and own keys and values."""
        length, own = kept[0][0].shape[0], []
        if behind:
            kept = [tuple(map(np.concatenate, zip(*both))) for both in zip(kept, behind)]
        at = np.arange(length, length + len(canvas))
        h = self._embed(canvas)
        if conditioning is not None:
            n = _norm(conditioning, self.get("decoder.self_conditioning.pre_norm.weight"))
            h = h + self._glu("decoder.self_conditioning", n)
        h = _norm(h)
        keys = np.arange(kept[0][0].shape[0] + len(canvas))
        recent = np.broadcast_to(keys > length - self.config.sliding_window, (len(canvas), len(keys)))
        for i, kind in enumerate(self.config.layer_types):
            mask = np.ones_like(recent) if kind == "full_attention" else recent
            h, kv = self._layer(i, h, at, kept[i], mask, self.get(f"decoder.layers.{i}.layer_scalar"))
            own.append(tuple(one[-len(canvas) :] for one in kv))
        return _norm(h, self.get("decoder.norm.weight")), own

    def _embed(self, tokens):
        return self.get("decoder.embed_tokens.weight")[np.array(tokens)] * self.config.hidden_size**0.5

    def _glu(self, name, x):
        gate, up = x @ self.get(f"{name}.gate_proj.weight").T, x @ self.get(f"{name}.up_proj.weight").T
        return (_gelu(gate) * up) @ self.get(f"{name}.down_proj.weight").T

    def _layer(self, i, x, at, before, mask, scalar):
        name = f"decoder.layers.{i}"

        def norm(which, value):
            return _norm(value, self.get(f"{name}.{which}.weight"))

        attended, kv = self._attend(i, norm("input_layernorm", x), at, before, mask)
        h = x + norm("post_attention_layernorm", attended)
        dense = norm("post_feedforward_layernorm_1", self._glu(f"{name}.mlp", norm("pre_feedforward_layernorm", h)))
        sparse = self._experts(name, norm("pre_feedforward_layernorm_2", h), h)
        sparse = norm("post_feedforward_layernorm_2", sparse)
        return (h + norm("post_feedforward_layernorm", dense + sparse)) * scalar, kv

    def _attend(self, i, x, at, before, mask):
        name, full = f"decoder.layers.{i}.self_attn", self.config.layer_types[i] == "full_attention"
        heads, (kv_heads, dim) = self.config.num_attention_heads, self.config.kv_shape(self.config.layer_types[i])
        theta, share = (1e6, 0.25) if full else (1e4, 1.0)
        q = _norm((x @ self.get(f"{name}.q_proj.weight").T).reshape(-1, heads, dim), self.get(f"{name}.q_norm.weight"))
        raw = (x @ self.get(f"{name}.k_proj.weight").T).reshape(-1, kv_heads, dim)
        k = _rope(_norm(raw, self.get(f"{name}.k_norm.weight")), at, theta, share)
        v = _norm(raw if full else (x @ self.get(f"{name}.v_proj.weight").T).reshape(-1, kv_heads, dim))
        if before is not None:
            k, v = np.concatenate([before[0], k]), np.concatenate([before[1], v])
        q, group = _rope(q, at, theta, share), heads // kv_heads
        out = np.zeros_like(q)
        for head in range(heads):
            scores = np.where(mask, q[:, head] @ k[:, head // group].T, -np.inf)
            out[:, head] = _softmax(scores) @ v[:, head // group]
        return out.reshape(len(x), -1) @ self.get(f"{name}.o_proj.weight").T, (k, v)

    def _experts(self, name, x, h):
        routed = _norm(h) * self.get(f"{name}.router.scale") * self.config.hidden_size**-0.5
        p = _softmax(routed @ self.get(f"{name}.router.proj.weight").T)
        out = np.zeros_like(x)
        for row in range(len(x)):
            chosen = np.argsort(-p[row])[: self.config.top_k_experts]
            for expert in chosen:
                weight = p[row, expert] / p[row, chosen].sum() * self.get(f"{name}.router.per_expert_scale")[expert]
                gate, up = np.split(self.get(f"{name}.experts.gate_up_proj.weight")[expert] @ x[row], 2)
                out[row] += weight * (self.get(f"{name}.experts.down_proj.weight")[expert] @ (_gelu(gate) * up))
        return out
