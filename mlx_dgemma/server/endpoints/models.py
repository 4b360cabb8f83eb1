"""What the server tells of its model: /v1/models as OpenAI, vLLM and Anthropic do, /api/v0/models as LM Studio."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..options import check_model
from ..settings import Settings

if TYPE_CHECKING:
    from ...engine import Engine

ARCHITECTURE = "diffusion_gemma"


@dataclass(frozen=True)
class ModelFacts:
    """A served model.

    Attributes:
        names: the model's, and its aliases.
        created: Unix time of the server's start.
        modified: Unix time of the checkpoint's configuration.
        context: the most tokens of prompt and answer together.
        nbytes: bytes of the weights as stored.
        parameters: number of weights.
        hidden_size, layers, vocabulary: of the text model.
        quantization: such as "4bit", or the stored type.
        vision: whether it sees pictures.
        thinks: whether it can think before it answers.
        digest: 64 hexadecimal digits that stand for the weights' names, types and shapes.
    """

    names: tuple[str, ...]
    created: int
    modified: float
    context: int
    nbytes: int
    parameters: int
    hidden_size: int
    layers: int
    vocabulary: int
    quantization: str
    vision: bool
    thinks: bool
    digest: str
    architecture: str = ARCHITECTURE

    @classmethod
    def of(cls, engine: Engine, settings: Settings) -> ModelFacts:
        """The facts of an engine's model. It makes arrays, so it belongs to the thread that starts the server."""
        checkpoint, text = engine.checkpoint, engine.config.text
        listed = sorted((name, one.dtype, one.shape) for name, one in checkpoint.tensors.items())
        bits = (checkpoint.quantization or {}).get("bits")
        return cls(
            names=settings.names,
            created=int(time.time()),
            modified=Path(checkpoint.path, "config.json").stat().st_mtime,
            context=text.max_position_embeddings,
            nbytes=checkpoint.nbytes,
            parameters=checkpoint.parameters,
            hidden_size=text.hidden_size,
            layers=len(text.layer_types),
            vocabulary=text.vocab_size,
            quantization=f"{bits}bit" if bits else max(one.dtype for one in checkpoint.tensors.values()),
            vision=engine.config.vision is not None,
            thinks=bool(engine.tokenizer.think_start_tokens),
            digest=sha256(repr(listed).encode()).hexdigest(),
        )

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What it can do, in Ollama's words."""
        sees, thinks = ("vision",) * self.vision, ("thinking",) * self.thinks
        return ("completion", "insert", "tools", *sees, *thinks)

    @property
    def size_in_words(self) -> str:
        """The number of parameters, such as 26.1B."""
        return f"{self.parameters / 1e9:.1f}B" if self.parameters >= 1e9 else f"{self.parameters / 1e6:.1f}M"


async def models(request: Request) -> Response:
    """GET /v1/models."""
    facts = request.app.state.facts
    ends = {"first_id": facts.names[0], "last_id": facts.names[-1], "has_more": False}
    return JSONResponse({"object": "list", "data": [_model(facts, name) for name in facts.names], **ends})


async def model(request: Request) -> Response:
    """GET /v1/models/{id}."""
    name = check_model(request.path_params["id"], request.app.state.settings)
    return JSONResponse(_model(request.app.state.facts, name))


async def studio_models(request: Request) -> Response:
    """GET /api/v0/models, LM Studio's list."""
    facts = request.app.state.facts
    return JSONResponse({"object": "list", "data": [_studio_model(facts, name) for name in facts.names]})


async def studio_model(request: Request) -> Response:
    """GET /api/v0/models/{id}."""
    name = check_model(request.path_params["id"], request.app.state.settings)
    return JSONResponse(_studio_model(request.app.state.facts, name))


def _model(facts: ModelFacts, name: str) -> dict[str, Any]:
    """A model in the words of OpenAI, vLLM, LM Studio, OpenRouter and Anthropic."""
    return {
        "id": name,
        "object": "model",
        "created": facts.created,
        "owned_by": "mlx-dgemma",
        "root": facts.names[0],
        "parent": None,
        "max_model_len": facts.context,
        "context_length": facts.context,
        "max_context_length": facts.context,
        "max_input_tokens": facts.context,
        "capabilities": list(facts.capabilities),
        "architecture": {
            "input_modalities": ["text", "image"] if facts.vision else ["text"],
            "output_modalities": ["text"],
        },
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(facts.created, timezone.utc).isoformat().replace("+00:00", "Z"),
    }


def _studio_model(facts: ModelFacts, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "type": "vlm" if facts.vision else "llm",
        "publisher": "mlx-dgemma",
        "arch": facts.architecture,
        "compatibility_type": "mlx",
        "quantization": facts.quantization,
        "state": "loaded",
        "max_context_length": facts.context,
        "loaded_context_length": facts.context,
        "capabilities": ["tool_use"],
    }
