"""The model `dgemma` for the command line tool `llm`, which finds this module by its entry point."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import llm
from llm.parts import AttachmentPart, ReasoningPart, StreamEvent, TextPart, ToolCallPart, ToolResultPart
from pydantic import Field

from ..errors import DgemmaError

if TYPE_CHECKING:
    from ..decoding.events import Result
    from ..engine import Engine
    from ..prompt.messages import Message

MODEL_ID, ALIASES = "dgemma", ("diffusiongemma",)
PICTURES = {"image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/tiff"}
LOADING = ("checkpoint", "adapter")  # options that choose the model
LOCK = threading.Lock()  # one answer at a time computes


class Options(llm.Options):
    """What `-o NAME VALUE` takes; the checkpoint's settings hold where nothing is given."""

    checkpoint: str | None = Field(None, description="Folder or Hub id; otherwise $MLX_DGEMMA_MODEL, else the demo")
    adapter: str | None = Field(None, description="Folder or Hub id of a LoRA or DoRA")
    seed: int | None = Field(None, description="The same seed gives the same text")
    max_tokens: int | None = Field(None, description="Maximum length of the answer")
    stop: str | None = Field(None, description="End the answer before this text")
    thinking: bool = Field(False, description="Let the model think before it answers")
    thinking_budget: int | None = Field(None, description="Tokens after which a thought is ended")
    mode: str | None = Field(None, description="diffusion, causal or speculative")
    temperature: float | None = Field(None, description="Token by token: 0 takes the most probable token")
    top_p: float | None = Field(None, description="Token by token: the share of the probability to draw from")
    top_k: int | None = Field(None, description="Token by token: so many tokens to draw from")
    min_p: float | None = Field(None, description="Token by token: the least share of the best token's probability")
    fast: bool | None = Field(None, description="Fix confident tokens for good: fewer steps")
    exact: bool | None = Field(None, description="Use the stopping rule of Transformers")
    max_denoising_steps: int | None = Field(None, description="Maximum number of denoising steps of a canvas")
    entropy_bound: float | None = Field(None, description="Nats; higher accepts more positions in one step")
    image_tokens: int | None = Field(None, description="The most soft tokens of a picture")


@cache
def engine_of(checkpoint: str | None, adapter: str | None) -> Engine:
    """The engine of a checkpoint, which stays loaded."""
    from ..engine import load

    return load(checkpoint, adapter=adapter)


def messages_of(prompt: Any) -> list[Message]:
    """A prompt with the conversation before it as `Engine.generate` takes it."""
    found: list[Message] = []
    for given in prompt.messages:
        results = [part for part in given.parts if isinstance(part, ToolResultPart)]
        found += [_result(one) for one in results]
        if len(results) < len(given.parts):
            found.append(_message(given))
    return found


def keywords_of(prompt: Any) -> dict[str, Any]:
    """What `Engine.stream` takes beside the messages."""
    options = {name: value for name in Options.model_fields if (value := getattr(prompt.options, name)) is not None}
    tools = [
        {"name": one.name, "description": one.description or "", "parameters": one.input_schema} for one in prompt.tools
    ]
    return {
        **{name: value for name, value in options.items() if name not in LOADING},
        **({"schema": prompt.schema} if prompt.schema else {}),
        **({"tools": [{"type": "function", "function": one} for one in tools]} if tools else {}),
    }


def answer(prompt: Any, response: Any) -> Iterator[StreamEvent]:
    """The events of an answer; the response is told its calls and what it took.

    Raises:
        llm.ModelError: the prompt or an option cannot be used.
    """
    from ..decoding.events import Block, Finished

    try:
        with LOCK:
            engine = engine_of(prompt.options.checkpoint, prompt.options.adapter)
            for event in engine.stream(messages_of(prompt), drafts=False, **keywords_of(prompt)):
                if isinstance(event, Block):
                    if event.thinking:
                        yield StreamEvent(type="reasoning", chunk=event.thinking)
                    if event.text:
                        yield StreamEvent(type="text", chunk=event.text)
                elif isinstance(event, Finished):
                    yield from _end(event.result, response)
    except DgemmaError as error:
        raise llm.ModelError(str(error)) from None


def _end(result: Result, response: Any) -> Iterator[StreamEvent]:
    for call in result.tool_calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        yield StreamEvent(type="tool_call_name", chunk=name, tool_call_id=call["id"])
        yield StreamEvent(type="tool_call_args", chunk=json.dumps(arguments), tool_call_id=call["id"])
        response.add_tool_call(llm.ToolCall(name=name, arguments=arguments, tool_call_id=call["id"]))
    stats = result.stats
    response.set_usage(input=stats.prompt_tokens, output=stats.generated_tokens)
    response.response_json = {
        "finish_reason": result.finish_reason,
        "seed": stats.seed,
        "denoising_steps": stats.denoising_steps,
        "tokens_per_second": stats.tokens_per_second,
    }


def _message(given: Any) -> Message:
    """A message of the conversation, without results of tools."""
    contents: list[Message] = []
    message: Message = {"role": given.role}
    for part in given.parts:
        if isinstance(part, TextPart):
            contents.append({"type": "text", "text": part.text})
        elif isinstance(part, AttachmentPart):
            contents.append({"type": "image", "image": part.attachment.content_bytes()})
        elif isinstance(part, ReasoningPart):
            message["reasoning_content"] = part.text
        elif isinstance(part, ToolCallPart):
            function = {"name": part.name, "arguments": part.arguments}
            call = {"id": part.tool_call_id, "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)
    if all(part["type"] == "text" for part in contents):
        return {**message, "content": "".join(part["text"] for part in contents)}
    return {**message, "content": sorted(contents, key=lambda part: part["type"] != "image")}


def _result(part: Any) -> Message:
    return {"role": "tool", "tool_call_id": part.tool_call_id, "name": part.name, "content": part.output}


class Described:
    """What both models tell of themselves."""

    model_id = MODEL_ID
    can_stream = True
    supports_schema = True
    supports_tools = True
    attachment_types = PICTURES
    Options = Options


class Dgemma(Described, llm.Model):
    """DiffusionGemma in this process."""

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any = None) -> Iterator[StreamEvent]:
        """Answer a prompt, canvas by canvas."""
        return answer(prompt, response)


class AsyncDgemma(Described, llm.AsyncModel):
    """DiffusionGemma on a thread of this process."""

    async def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: Any = None
    ) -> AsyncGenerator[StreamEvent, None]:
        """Answer a prompt, canvas by canvas."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        left = threading.Event()

        def work() -> None:
            import mlx.core as mx

            last = None
            try:
                for event in answer(prompt, response):
                    loop.call_soon_threadsafe(queue.put_nowait, event)
                    if left.is_set():
                        return
            except BaseException as error:
                last = error
            finally:
                mx.clear_streams()  # the thread used MLX
                loop.call_soon_threadsafe(queue.put_nowait, last)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while isinstance(event := await queue.get(), StreamEvent):
                yield event
            if event is not None:
                raise event
        finally:
            left.set()
            await asyncio.to_thread(thread.join)


@llm.hookimpl
def register_models(register: Any) -> None:
    """Tell `llm` of the model."""
    register(Dgemma(), AsyncDgemma(), aliases=ALIASES)
