"""The paper model of a denoising step on several Macs: the step's arithmetic, dealt to them, and their messages.

It was made from MLX's sources and other people's measurements. No cluster has run it.
"""

from __future__ import annotations

from typing import NamedTuple

from ..checkpoint.slices import PACKED_UNIT
from ..distributed.dealing import deal, kv_heads_of, largest
from ..model.config import ModelConfig
from .paper import paper_step
from .shapes import raw_config

HANDOVER_MS = 0.18  # GPU to CPU and back for a message on Metal, on an M3 Ultra: github.com/ml-explore/mlx/issues/4438
HEAD_MESSAGES = 4  # of about [canvas, hidden] numbers: embeddings, likely tokens' products and rows, expectations


class Link(NamedTuple):
    """What connects two Macs.

    Attributes:
        rate: GB/s that a message reaches in one direction.
        latency: ms of a message.
        mesh: every two Macs have a cable of their own, so each sends to all others at once; otherwise a ring.
    """

    rate: float
    latency: float
    mesh: bool


LINKS = {
    # 1 MiB in 0.15 ms and 16 MiB in 1.85 ms over RDMA on Thunderbolt 5: github.com/pytorch/pytorch/pull/181087
    "JACCL": Link(9.25, 0.037, True),
    # 1460 of each 1538 bytes are payload; 300 us:
    # jeffgeerling.com/blog/2025/15-tb-vram-on-mac-studio-rdma-over-thunderbolt-5
    "10 Gb Ethernet": Link(1.187, 0.3, False),
}


def message_ms(link: Link, nbytes: float, ranks: int) -> float:
    """Milliseconds of a sum over ranks, by the algorithm of MLX's backend for the link."""
    if ranks == 1:
        return 0.0
    turns = 1 if link.mesh else 2 * (ranks - 1)  # a ring sums the pieces going round once, and hands them round again
    return turns * link.latency + sent_bytes(link, nbytes, ranks) / (ranks - 1 if link.mesh else 1) / (link.rate * 1e6)


def sent_bytes(link: Link, nbytes: float, ranks: int) -> float:
    """Bytes that each rank sends for a sum of `nbytes` over ranks."""
    return nbytes * (ranks - 1) * (1 if link.mesh else 2 / ranks)


def step_messages(config: ModelConfig, itemsize: int = 2) -> list[int]:
    """Bytes of the sums of a step: behind attention, and of the dense MLP and the experts together, in every layer."""
    row = config.canvas_length * config.text.hidden_size * itemsize
    return [row, 2 * row] * config.text.num_hidden_layers + [row] * HEAD_MESSAGES


def dealt_shares(config: ModelConfig, ranks: int) -> dict[str, float]:
    """The share of each part of a step that the rank with the most computes; parts that are not named are computed by
    every rank in full.
    """
    text = config.text
    heads = deal(text.num_attention_heads, ranks)

    def width(total: int) -> float:
        return largest(deal(total, ranks, PACKED_UNIT)) / total

    scores = largest(heads) / text.num_attention_heads
    projections = 0.0
    for kind in text.layer_types:
        kv_heads, _ = text.kv_shape(kind)
        own = max(len(kv_heads_of(span, text.num_attention_heads // kv_heads)) for span in heads)
        copies = 1 if kind == "full_attention" else 2
        whole = 2 * text.num_attention_heads + copies * kv_heads
        projections += (2 * largest(heads) + copies * own) / whole / text.num_hidden_layers
    return {
        "experts": width(text.moe_intermediate_size),
        "attention projections": projections,
        "attention scores": scores,
        "dense MLP": width(text.intermediate_size),
        "head": 1 / ranks,
    }


def cluster_step(
    device: str, config: ModelConfig, prefix: int, ranks: int, link: Link, handover: float = HANDOVER_MS
) -> dict[str, float] | None:
    """Milliseconds of a step on several equal Macs: computing, messages, and in all; None: see `paper_step`.

    Args:
        device: a device's name.
        config: the model's.
        prefix: positions behind which the canvas stands.
        ranks: how many Macs.
        link: what connects them.
        handover: ms that a message waits for GPU and CPU.
    """
    if (alone := paper_step(device, config, prefix)) is None:
        return None
    shares = dealt_shares(config, ranks)
    computing = sum(ms * shares.get(part, 1.0) for part, ms in alone.items() if part != "sum")
    sums = step_messages(config) if ranks > 1 else []
    messages = sum(message_ms(link, one, ranks) + handover for one in sums)
    return {"computing": computing, "messages": messages, "sum": computing + messages}


def table(devices: tuple[str, ...] = ("Apple M4 Max", "Apple M3 Ultra", "Apple M5 Max"), prefix: int = 1024) -> str:
    """The steps of the release on one, two and four Macs, as text."""
    config = ModelConfig.from_dict(raw_config("26b"))
    lines = [f"{'ms of a step':16}{'Macs':>6}{'computing':>11}{'JACCL':>8}{'in all':>8}{'Ethernet':>10}{'in all':>8}"]
    for device in devices:
        for ranks in (1, 2, 4):
            steps = [cluster_step(device, config, prefix, ranks, link) for link in LINKS.values()]
            if (first := steps[0]) is None:
                continue
            numbers = f"{first['computing']:11.0f}"
            for step, width in zip(steps, (8, 10)):
                assert step is not None
                numbers += f"{step['messages']:{width}.0f}{step['sum']:8.0f}"
            lines.append(f"{device:16}{ranks:6}{numbers}")
    return "\n".join(lines)
