"""`PromptBuilder`: messages, pictures and options become a `Request`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

from ..constraints.language import Language
from ..constraints.tokens import TokenBytes
from ..decoding.costs import Costs, reckoned
from ..decoding.options import GenerationOptions, whole_number
from ..decoding.request import Request
from ..decoding.session import Picture, PromptTokens
from ..distributed.group import ALONE
from ..errors import OptionError, PromptError, shown
from ..model.config import ModelConfig
from .answer import Answer
from .endings import with_hand_off
from .images import digest, open_image, patchify
from .lanes import HERE, LANES
from .languages import Languages
from .messages import SYSTEM_ROLES, Message, joined, parts_of, reject_surrogates
from .template import apply_template, opens_thought, render, texts_of
from .video import sample_frames, stamp
from .vocabulary import vocabulary_of

VIDEO = "<|video|>"  # Gemma 4's marker in chat templates; it never reaches the model
FEW_CHARACTERS = 4  # a token, on average: of longer texts the tokens are counted before the template sees them
SMALL = 2**18  # characters of texts that the template may see in any case, so that their tokens are counted exactly
PIECE = 2**16  # characters whose tokens are counted at a time


class PromptBuilder:
    """Makes requests of prompts, and knows what a tokenizer's tokens are.

    Args:
        tokenizer: mlx-lm's wrapper around the checkpoint's tokenizer.
        config: of the model.
        options: the checkpoint's own.
        video_tokens: the most soft tokens of a video frame.
        costs: of the model's passes, by which a mode is chosen; None: they are reckoned.
        draw_seed: draws a seed where none is given.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: ModelConfig,
        options: GenerationOptions,
        video_tokens: int,
        costs: Callable[[], Costs] | None = None,
        draw_seed: Callable[[], int] = ALONE.draw_seed,
    ):
        self.tokenizer, self.config, self.options = tokenizer, config, options
        self._video_tokens, self.costs = video_tokens, costs or partial(reckoned, config.text)
        self._draw_seed = draw_seed
        self._languages = Languages(lambda: self.token_bytes)

    def request(
        self,
        messages: list[Message],
        seed: int | None,
        options: GenerationOptions,
        thinking: bool = False,
        tools: list[dict] | None = None,
    ) -> Request:
        """A request for the assistant's answer to a conversation.

        Args:
            messages: from `messages_of`.
            seed: None: one is drawn.
            options: in force.
            thinking: whether the template may ask for a thought.
            tools: function declarations in OpenAI's form.

        Raises:
            PromptError: the template refuses the messages, a picture cannot be read, or the prompt is too long.
            OptionError: a seed that is none.
        """
        if tools:
            options = with_hand_off(options, self.options, self.tokenizer)
        if seed is None:
            seed = self._draw_seed()
        number = whole_number(seed)
        if number is None or not 0 <= number < 2**64:
            raise OptionError(f"seed is {shown(seed)}; it should be a whole number from 0 to 2**64 - 1.")
        vocab_size = self.config.text.vocab_size
        if outside := [token for token in options.end_tokens if token >= vocab_size]:
            raise OptionError(f"end_tokens has {outside[0]}, but the vocabulary has {vocab_size} tokens; leave it out.")
        self.check_texts(messages, tools)
        prompt = self.prompt_tokens(messages, thinking, tools, options, self.check_characters)
        self.check_room(len(prompt.tokens))
        thinks = opens_thought(self.tokenizer, prompt.tokens)
        answer = Answer(
            self.tokenizer,
            options.end_tokens,
            options.max_tokens,
            options.stop,
            thinks=thinks,
            tools=tools or None,
            thinking_budget=options.thinking_budget,
        )
        return Request(prompt, number, options, answer, notes=answer.notes)

    def prompt_tokens(
        self,
        messages: list[Message],
        thinking: bool = False,
        tools: list[dict] | None = None,
        options: GenerationOptions | None = None,
        check: Callable[[int], None] = lambda count: None,
    ) -> PromptTokens:
        """A conversation as the model reads it, ready for the assistant's answer.

        Args:
            messages: from `messages_of`.
            thinking, tools: as `request` takes them.
            options: what pictures and videos may take; None takes the checkpoint's.
            check: told the number of characters of the whole text before it is cut into tokens; it may raise.

        Raises:
            PromptError: the template refuses the messages, a picture cannot be read, or the prompt is too long.
        """
        messages = self._placed(messages)
        pictures, spans, times = self._media(messages, options or self.options)
        placeholder = self.config.image_token_id
        tokens = render(self.tokenizer, messages, tools, thinking, spans, (self._token(placeholder), VIDEO), check)
        digests = iter([picture.digest for picture in pictures for _ in range(picture.tokens)])
        cache_key = [next(digests) if token == placeholder and pictures else token for token in tokens]
        heard = [text for part in parts_of(messages, "text") for text in part.get("transcripts", ())]
        return PromptTokens(tokens, cache_key, pictures, times, heard)

    def _placed(self, messages: list[Message]) -> list[Message]:
        """The messages with every system message where the template shows it: in the first, if it drops later ones."""
        late = [one for one in messages[1:] if one["role"] in SYSTEM_ROLES]
        if not late or all(self._shows_late[one["role"]] for one in late):
            return messages
        first = messages[:1] if messages[0]["role"] in SYSTEM_ROLES else []
        rest = [one for one in messages[len(first) :] if one["role"] not in SYSTEM_ROLES]
        return [joined([*first, *late]), *rest]

    @cached_property
    def _shows_late(self) -> dict[str, bool]:
        """By role, whether the template shows a system message that is not the first."""
        found, said = {}, "a message of its own"
        for role in SYSTEM_ROLES:
            turns = [{"role": one, "content": said if one == role else "a"} for one in ("user", role, "user")]
            try:
                found[role] = said in apply_template(self.tokenizer, turns, None, False)
            except PromptError:
                found[role] = False
        return found

    def extend(self, request: Request, tokens: Sequence[int], beside: int) -> None:
        """Let the answer of a request begin with tokens; `beside` more are to have room on canvases.

        Raises:
            PromptError: the context has no room for them.
        """
        request.prompt.extend(list(tokens))
        self.check_room(len(request.prompt.tokens) + max(beside - self.config.canvas_length, 0))

    def load_image(self, source: Any, budget: int) -> Picture:
        """Decode a picture ahead of time, in any thread, so that `request` does not have to.

        Args:
            source: what `Engine.generate` takes, or such a picture itself.
            budget: the most soft tokens, one of `patches.BUDGETS`.

        Returns:
            What may stand in a message's image part.

        Raises:
            PromptError: it cannot be read, or the checkpoint has no vision tower.
        """
        return self.load_part({"image": source}, budget)

    def load_part(self, part: Message, budget: int) -> Picture:
        """As `load_image`, of a message's image part, whose source the picture replaces: threads share the work."""
        vision = self.config.vision
        if vision is None:
            raise PromptError("This checkpoint has no vision tower, so it cannot look at pictures; send text alone.")

        def decode() -> Picture:
            source = part["image"]
            if isinstance(source, Picture):  # another thread decoded it while this one waited
                return source
            image = open_image(source)
            patches = patchify([image], budget, vision.patch_size, vision.pooling_kernel_size)
            found = part["image"] = Picture(f"{digest(image)}/{budget}", patches)
            return found

        known = part["image"]
        return known if isinstance(known, Picture) else LANES.get(HERE).picture(decode)

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes that each token of this tokenizer stands for."""
        added = [token for token, one in self.tokenizer.added_tokens_decoder.items() if one.special]
        wrapper = self.tokenizer
        marks = [wrapper.think_start_tokens, wrapper.think_end_tokens]
        marks += [wrapper.tool_call_start_tokens, wrapper.tool_call_end_tokens]
        markers = [tokens[0] for tokens in marks if tokens]  # an answer's reader takes them for more than text
        return TokenBytes(wrapper, self.config.text.vocab_size, [*added, *markers, *self.options.end_tokens])

    @cached_property
    def turn_end(self) -> int:
        """The token that ends an answer in this checkpoint's chats."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        return next((t for t in reversed(tokens) if t in self.options.end_tokens), self.options.end_tokens[0])

    def language(self, source: Any, what: str, kind: str = "plain") -> Language:
        """The language of a constraint, as `lanes.make_language` makes it; the last few are kept."""
        return self._languages.get(kind, source, what)

    def check_room(self, count: int) -> None:
        """Raise PromptError where the context has no room for so many tokens and a canvas."""
        room = self.config.text.max_position_embeddings - self.config.canvas_length
        if count > room:
            raise PromptError(
                f"The prompt has {count} tokens, but the context leaves room for {room} "
                f"beside a canvas of {self.config.canvas_length}; shorten it."
            )

    def check_texts(self, messages: Sequence[Message], tools: Sequence[dict] | None = None) -> None:
        """Refuse messages and tools that cannot fit, before the template makes several copies of them.

        Raises:
            PromptError: the context has no room for their texts.
        """
        contents = [message["content"] for message in messages if isinstance(message["content"], str)]
        texts = [*contents, *(part["text"] for part in parts_of(messages, "text")), *texts_of(tools)]
        count, tokens = sum(map(len, texts)), 0
        self.check_characters(count)
        room, longest = self.config.text.max_position_embeddings - self.config.canvas_length, self._longest_token
        if count <= max(room * FEW_CHARACTERS, SMALL):
            return
        for piece in (text[at : at + PIECE] for text in texts for at in range(0, len(text), PIECE)):
            reject_surrogates("The prompt", piece)
            tokens += max(len(vocabulary_of(self.tokenizer).encode(piece)) - longest, 0)  # seams may need fewer
            if tokens > room:
                raise PromptError(
                    f"The prompt has more than {room} tokens, but the context leaves room for {room} "
                    f"beside a canvas of {self.config.canvas_length}; shorten it."
                )

    def check_characters(self, count: int) -> None:
        """Refuse texts that no tokens could make fit, before they are cut into tokens, which takes a second a MB.

        Raises:
            PromptError: the context has no room for so many characters.
        """
        room = self.config.text.max_position_embeddings - self.config.canvas_length
        if count > room * self._longest_token:
            raise PromptError(
                f"The prompt has {count} characters, but the context leaves room for {room} tokens of at most "
                f"{self._longest_token}; shorten it."
            )

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.tokenizer.get_vocab()))

    def _token(self, token: int) -> str:
        return self.tokenizer.convert_ids_to_tokens(token)

    def _media(
        self, messages: list[Message], options: GenerationOptions
    ) -> tuple[list[Picture], list[tuple[str, str]], list[float]]:
        """A prompt's pictures, each part's marker with the placeholders in its place, and the frames' times."""
        pictures: list[Picture] = []
        spans: list[tuple[str, str]] = []
        times: list[float] = []
        parts = parts_of(messages, "image", "video")
        if not parts:
            return pictures, spans, times
        config, image = self.config, self._token(self.config.image_token_id)
        begin, end = self._token(config.boi_token_id), self._token(config.eoi_token_id)

        def span(picture: Picture) -> str:
            pictures.append(picture)
            return begin + image * picture.tokens + end

        for part in parts:
            if part["type"] == "image":
                spans.append((image, span(self.load_image(part["image"], options.image_tokens))))
                continue
            frames = []
            for frame in sample_frames(part["video"], options.fps, options.max_frames):
                times.append(frame.seconds)
                frames.append(f"{stamp(frame.seconds)} {span(self.load_image(frame.image, self._video_tokens))}")
            spans.append((VIDEO, " ".join(frames)))
        return pictures, spans, times
