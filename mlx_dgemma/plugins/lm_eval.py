"""The model `mlx-dgemma` for lm-evaluation-harness.

The harness looks for no models in other packages, so it is started from here, with all of its own options:

    python -m mlx_dgemma.plugins.lm_eval --model mlx-dgemma --model_args pretrained=FOLDER --tasks NAME

The likelihood of a text is that of the causal mode, whose next-token distribution is exact. The denoiser has none: with
`likelihood=bound` it is bounded from below, by `tune.likelihood`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from ..decoding.events import Finished
from ..decoding.loop import Loop
from ..decoding.prefill import prefill
from ..decoding.request import Request
from ..decoding.session import PromptTokens
from ..engine import Engine, load
from ..errors import OptionError
from ..model import device
from ..prompt.answer import Answer
from ..prompt.template import opens_thought
from ..tune.data import Example, Target
from ..tune.likelihood import bound, next_token_log_probs
from ..tune.objective import VARIANTS
from ..tune.run import infer_fill_token

if TYPE_CHECKING:
    from ..model.kv_cache import Prefix

LIKELIHOODS = ("causal", "bound")
EXAMPLES = 8  # from which the token is inferred that fills canvases


@register_model("mlx-dgemma")
class DgemmaLM(LM):
    """DiffusionGemma as the harness asks it.

    Args:
        pretrained: folder or Hub id; None takes $MLX_DGEMMA_MODEL, else the demo.
        adapter: folder or Hub id of a LoRA or DoRA.
        dtype: as `load` takes it.
        batch_size: answers that are generated together.
        max_gen_toks: length of an answer where the task gives none.
        likelihood: "causal", exact for the causal mode, or "bound", of the denoiser.
        draws: times for each canvas of a bound.
        seed: of the answers and of the bound's noise.
        thinking: let the model think before it answers, with --apply_chat_template; the thought is no part of a text.
        options: any field of `GenerationOptions`, such as mode or max_denoising_steps.

    Raises:
        OptionError: an unknown option, or a value outside its bounds.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        adapter: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 8,
        max_gen_toks: int = 256,
        likelihood: str = "causal",
        draws: int = 8,
        seed: int = 0,
        thinking: bool = False,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ):
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise OptionError(f"likelihood is {likelihood!r}; it should be {' or '.join(LIKELIHOODS)}.")
        if device not in (None, "", "mps", "gpu", "cpu", "cuda", "cuda:0"):
            raise OptionError(f"device is {device!r}; MLX chooses it: leave it out.")
        self.engine: Engine = load(pretrained, dtype, adapter=adapter)
        self.batch_size = 8 if batch_size in ("auto", None) else int(batch_size)
        self.max_gen_toks, self.likelihood, self.draws, self.seed = max_gen_toks, likelihood, draws, seed
        self._options, self._thinking = options, thinking
        self.engine.options.override(**options)
        self._prefix: tuple[list[int], Prefix] | None = None  # of the last text before a continuation
        self._fill: int | None = None

    @property
    def max_length(self) -> int:
        """The most tokens that are scored in one piece."""
        return self.engine.config.text.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps rendered prompts under."""
        return str(self.engine.checkpoint.path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The checkpoint's template, for the harness' notes."""
        return str(self.engine.tokenizer.chat_template) if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text with the template's markers."""
        return self.engine.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            enable_thinking=self._thinking,
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that continue contexts, as they are or in the template."""
        found: list[str] = []
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            texts = self._run([self._request(*one.args) for one in batch])
            for one, text in zip(batch, texts):
                self.cache_hook.add_partial("generate_until", one.args, text)
            found += texts
        return found

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each context and continuation log p in nats, and whether every token is the most probable one."""
        pairs = [self._pair(*one.args) for one in requests]
        if self.likelihood == "bound":
            self._fill = self._fill if self._fill is not None else self._infer_fill(pairs[:EXAMPLES])
        found = []
        for one, (tokens, start) in zip(requests, pairs):
            result = self._bound(tokens, start) if self.likelihood == "bound" else self.score(tokens, start)
            self.cache_hook.add_partial("loglikelihood", one.args, result)
            found.append(result)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts in nats. A text longer than the context is scored in pieces, each token once."""
        found = []
        for one in requests:
            tokens, total, start = self._encode(one.args[0]), 0.0, 1
            while start < len(tokens):
                end = min(start + self.max_length - 1, len(tokens))
                piece = tokens[max(end - self.max_length, 0) : end]  # with as much context as there is room for
                total += self._log_p(piece, len(piece) - (end - start))
                start = end
            self.cache_hook.add_partial("loglikelihood_rolling", one.args, total)
            found.append(total)
        return found

    def score(self, tokens: list[int], start: int) -> tuple[float, bool]:
        """log p of tokens[start:] behind tokens[:start] in causal mode, in nats, and whether each is the most probable.

        Args:
            tokens: token ids.
            start: at least 1.
        """
        model, before = self.engine.model, tokens[: start - 1]
        if self._prefix is None or self._prefix[0] != before:
            prefix = model.new_prefix(1, capacity=len(tokens))
            if before:
                prefill(model, prefix, np.array([before], np.int32), None)
            self._prefix = before, prefix
        log_probs, best = next_token_log_probs(model, tokens, start, self._prefix[1].fork())
        return float(log_probs.sum()), bool(best.all())

    def _log_p(self, tokens: list[int], start: int) -> float:
        if self.likelihood == "causal":
            return self.score(tokens, start)[0]
        self._fill = self._fill if self._fill is not None else self._infer_fill([(tokens, start)])
        return self._bound(tokens, start)[0]

    def _bound(self, tokens: list[int], start: int) -> tuple[float, bool]:
        """A lower bound of log p of tokens[start:]; whether they are the most probable ones is not known."""
        assert self._fill is not None
        told = bound(self.engine, [_example(tokens, start)], self._fill, self.draws, self.seed)
        return -told.nats * told.tokens, False

    def _infer_fill(self, pairs: Sequence[tuple[list[int], int]]) -> int:
        return infer_fill_token(self.engine, [_example(*pair) for pair in pairs], VARIANTS["google"], self.seed)

    def _encode(self, text: str) -> list[int]:
        """Token ids, beginning with the one that begins every text."""
        tokens, first = self.engine.tokenizer.encode(text, add_special_tokens=False), self.engine.tokenizer.bos_token_id
        return tokens if first is None or tokens[:1] == [first] else [first, *tokens]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """The tokens of both, and where the continuation begins: with the first one that the context alone has not."""
        tokens, alone = self._encode(context + continuation), self._encode(context)
        same = (i for i, (one, other) in enumerate(zip(tokens[:-1], alone)) if one != other)
        start = next(same, min(len(alone), len(tokens) - 1))
        return tokens[-self.max_length :], max(start - max(len(tokens) - self.max_length, 0), 1)

    def _request(self, context: str, given: dict[str, Any]) -> Request:
        options = {**self._options, **given}
        until, limit = options.pop("until", None) or (), options.pop("max_gen_toks", self.max_gen_toks)
        draws = options.pop("do_sample", False)
        if options.get("mode", self.engine.options.mode) == "diffusion":
            options.pop("temperature", None)  # canvases have a schedule, and the seed is fixed
        elif not draws:
            options["temperature"] = 0.0
        options.setdefault("max_tokens", limit)
        effective = self.engine.options.override(stop=until, **options)
        tokens, room = self._encode(context), self.max_length - self.engine.config.canvas_length
        tokens = tokens[-room:]
        reader = Answer(
            self.engine.tokenizer,
            effective.end_tokens,
            effective.max_tokens,
            effective.stop,
            thinks=opens_thought(self.engine.tokenizer, tokens),
        )
        return Request(PromptTokens(tokens, list(tokens)), self.seed, effective, reader, notes=reader.notes)

    def _run(self, requests: Sequence[Request]) -> list[str]:
        """The texts of requests that are generated together."""
        loop, texts = Loop(self.engine.model, 0.0), {}
        with device.wired_limit(), closing(loop):
            for request in requests:
                loop.add(request)
            while loop.requests:
                for request, event in loop.step():
                    if isinstance(event, Exception):
                        raise event
                    if isinstance(event, Finished):
                        texts[request] = event.result.text
        return [texts[request] for request in requests]


def _example(tokens: list[int], start: int) -> Example:
    return Example("a request", [Target(tokens[:start], tokens[start:], [])], {})


def main() -> None:
    """The harness' own command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
