"""`GenerationOptions`: how to generate. All options are checked here, once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple, TypedDict

from ..errors import OptionError, shown
from ..model.config import GenerationConfig, ProcessorConfig
from ..model.patches import check_budget

RULES = ("accept", "settle", "renoise")  # functions of arrays: see `rules`

# The rules beside the checkpoint's own, by mode. bench/RESULTS.md has what they cost and save.
STOP_DEFAULTS: dict[str, dict[str, Any]] = {
    "exact": {"certainty_threshold": 0, "patience": 0, "entropy_rise": 0},
    "default": {"certainty_threshold": 0.3, "patience": 2, "entropy_rise": 2},
    "fast": {"certainty_threshold": 0.3, "patience": 2, "entropy_rise": 0},
}
# What an effort stands for. docs/options-and-modes.md has the right answers and positions of each.
EFFORTS: dict[str, dict[str, Any]] = {"low": {"fast": True}, "medium": {}, "high": {"entropy_rise": 0}}

MODES = ("diffusion", "causal", "speculative", "auto")
_FLAGS = ("exact", "fast")
MAX_INTEGER = 2**31 - 1  # arrays of tokens and of counts are int32
MAX_NUMBER = 1e9
MIN_TEMPERATURE = 0.001  # of the first step: logits divided by much less overflow
_WHOLE_NUMBERS = {  # name: least and greatest value
    "max_tokens": (1, MAX_INTEGER),
    "max_denoising_steps": (1, 100_000),  # each takes a random key
    "stability_threshold": (0, MAX_INTEGER),
    "patience": (0, MAX_INTEGER),
    "thinking_budget": (0, MAX_INTEGER),
    "prefill_chunk": (1, MAX_INTEGER),
    "max_frames": (1, MAX_INTEGER),
    "top_k": (0, MAX_INTEGER),
}
_NUMBERS = (
    "entropy_bound",
    "t_min",
    "t_max",
    "confidence_threshold",
    "certainty_threshold",
    "entropy_rise",
    "fps",
)  # 0 at least
_ABOVE_ZERO = ("t_max", "fps")
_TOKEN_NUMBERS = {  # least and greatest value of what token by token knows; None: not given
    "temperature": (0, MAX_NUMBER),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, MAX_NUMBER),
}
TOKEN_OPTIONS = ("top_k", *_TOKEN_NUMBERS)
CANVAS_OPTIONS = (  # of diffusion alone
    "max_denoising_steps", "entropy_bound", "t_min", "t_max", "stability_threshold", "confidence_threshold",
    "certainty_threshold", "patience", "entropy_rise", "effort", "canvas", *RULES,
)  # fmt: skip
_OPTIONAL = ("prefill_chunk", "thinking_budget", *TOKEN_OPTIONS)


class Sampling(NamedTuple):
    """How a token is drawn where text comes token by token."""

    temperature: float = 1.0  # 0: the most probable token
    top_p: float = 1.0  # the fewest most probable tokens that have this share of the probability
    top_k: int = 0  # that many most probable tokens; 0: all
    min_p: float = 0.0  # tokens with this share of the most probable one's probability
    repetition_penalty: float = 1.0  # divides positive logits of tokens that prompt and text have, multiplies negative


class OptionKeywords(TypedDict, total=False):
    """The fields of `GenerationOptions` as keyword arguments; None leaves an option as it is."""

    max_tokens: int | None
    stop: str | Sequence[str] | None
    thinking_budget: int | None
    max_denoising_steps: int | None
    entropy_bound: float | None
    t_min: float | None
    t_max: float | None
    stability_threshold: int | None
    confidence_threshold: float | None
    exact: bool | None
    fast: bool | None
    certainty_threshold: float | None
    patience: int | None
    canvas: str | int | None
    end_tokens: int | Sequence[int] | None
    prefill_chunk: int | None
    image_tokens: int | None
    fps: float | None
    max_frames: int | None
    mode: str | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    entropy_rise: float | None
    effort: str | None
    accept: Callable[..., Any] | None
    settle: Callable[..., Any] | None
    renoise: Callable[..., Any] | None


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate. Precedence: explicit option > the checkpoint's generation_config > these defaults.

    Raises:
        OptionError: a value outside its bounds.
    """

    max_tokens: int = 256  # the text is cut there; the canvas stays whole
    stop: tuple[str, ...] = ()  # the text ends before the first of these strings
    thinking_budget: int | None = None  # tokens after which a thought is ended; None: it ends where the model ends it
    max_denoising_steps: int = 48  # steps after which a canvas that has not settled is taken as it is
    entropy_bound: float = 0.1  # nats; higher accepts more positions at once
    t_min: float = 0.4  # temperature at the last step
    t_max: float = 0.8  # temperature at the first step
    stability_threshold: int = 1  # earlier steps whose argmax must be the same
    confidence_threshold: float = 0.005  # nats; mean entropy below which a canvas has settled
    exact: bool = False  # settle as the reference does, by the two thresholds above over the whole canvas
    fast: bool = False  # keep best tokens for good once they are confident, instead of drawing by entropy_bound
    certainty_threshold: float | None = None  # nats; settled where no position is above (0.3; 0: never)
    patience: int | None = None  # steps without change that settle a canvas (2; 0: never)
    canvas: str | int = "auto"  # computed as far as the answer goes; "full"; or positions of the first, then double
    end_tokens: tuple[int, ...] = (1,)  # any of these ends the text
    prefill_chunk: int | None = None  # prompt tokens encoded at once; None: `prefill.fitting_chunk`
    image_tokens: int = 280  # the most soft tokens of a picture: 70, 140, 280, 560 or 1120
    fps: float = 1.0  # frames taken from a second of video
    max_frames: int = 32  # frames taken from a whole video
    mode: str = "diffusion"  # by canvases; "causal": by tokens; "speculative": the same text from drafts; or "auto"
    temperature: float | None = None  # this and what follows are causal mode's: see `Sampling`, which has the defaults
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    entropy_rise: float | None = None  # share of entropy_bound that each step adds to it (2; exact and fast 0)
    effort: str | None = None  # "low", "medium" or "high": see `EFFORTS`; options that are given by themselves win
    accept: Callable[..., Any] | None = None  # a rule of one's own: positions that a step accepts; see `rules.Seen`
    settle: Callable[..., Any] | None = None  # whether a canvas has settled, instead of all stop rules
    renoise: Callable[..., Any] | None = None  # what stands where nothing is accepted, instead of the noise alone

    _fitted: ClassVar[tuple[tuple[str, Any, Any], ...]] = ()  # (option, value by default, in other modes)

    def __post_init__(self):
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is {getattr(self, name)!r}; it should be true or false.")
        self._set_stop_rules()
        for name, (least, greatest) in _WHOLE_NUMBERS.items():
            if not (name in _OPTIONAL and getattr(self, name) is None):
                whole = whole_number(getattr(self, name))
                self._set_number(name, whole, "a whole number", least, str(least), greatest)
        for name in _NUMBERS:
            low, named = (self.t_min, f"t_min = {self.t_min}") if name == "t_max" else (0, "0")
            self._set_number(name, _real_number(getattr(self, name)), "a number", low, named, MAX_NUMBER)
        for name in _ABOVE_ZERO:
            if getattr(self, name) == 0:
                raise OptionError(f"{name} is {getattr(self, name)!r}; it should be above 0.")
        if self.t_max < MIN_TEMPERATURE:
            raise OptionError(f"t_max is {self.t_max!r}; it should be a number, at least {MIN_TEMPERATURE}.")
        check_budget(self.image_tokens)
        self._set_canvas()
        self._set_sequences()
        self._set_mode()
        self._check_rules()

    def _set_number(
        self, name: str, number: float | None, noun: str, least: float, named: str, greatest: float
    ) -> None:
        if number is None or number in (math.inf, -math.inf) or number < least:
            raise OptionError(f"{name} is {shown(getattr(self, name))}; it should be {noun}, at least {named}.")
        if number > greatest:
            raise OptionError(f"{name} is {shown(getattr(self, name))}; it should be {noun}, at most {greatest:.0f}.")
        object.__setattr__(self, name, number)

    def _set_canvas(self) -> None:
        whole = whole_number(self.canvas)
        if whole is None and (type(self.canvas) is str and self.canvas in ("auto", "full")):
            return
        if whole is None or not 1 <= whole <= MAX_INTEGER:
            raise OptionError(f"canvas is {shown(self.canvas)}; it should be auto, full or a whole number, at least 1.")
        if self.exact:
            raise OptionError(f"exact is True and canvas is {whole}; the reference knows no such thing: leave one out.")
        object.__setattr__(self, "canvas", whole)

    def canvas_at(self, block: int, length: int) -> int:
        """Positions of the canvas of a block, of a model whose canvases have `length`: a short first one doubles."""
        return min(self.canvas << min(block, 32), length) if isinstance(self.canvas, int) else length

    def _set_mode(self) -> None:
        """Check the mode and what only some modes know."""
        if self.mode not in MODES:
            raise OptionError(f"mode is {shown(self.mode)}; it should be one of {', '.join(MODES)}.")
        for name, (least, greatest) in _TOKEN_NUMBERS.items():
            if (given := getattr(self, name)) is not None:
                number = _real_number(given)
                if number is None or not least <= number <= greatest:
                    raise OptionError(f"{name} is {shown(given)}; it should be a number from {least} to {greatest:g}.")
                object.__setattr__(self, name, number)
        if self.top_p == 0 or self.repetition_penalty == 0:
            name = "top_p" if self.top_p == 0 else "repetition_penalty"
            raise OptionError(f"{name} is 0; it should be above 0.")
        if self.temperature and self.temperature < MIN_TEMPERATURE:
            raise OptionError(f"temperature is {self.temperature!r}; it should be 0, or at least {MIN_TEMPERATURE}.")
        if self.causal and (self.exact or self.fast):
            name = "exact" if self.exact else "fast"
            raise OptionError(f"mode is {self.mode!r} and {name} is True, which is a way of diffusion: leave one out.")
        given_here = [name for name in TOKEN_OPTIONS if getattr(self, name) is not None]
        if self.mode == "auto" and given_here and (self.exact or self.fast):
            name = "exact" if self.exact else "fast"
            raise OptionError(f"{name} is True, and {given_here[0]} is of token by token: leave one out.")
        if self.mode == "diffusion" and given_here:
            name = given_here[0]
            more = "t_min and t_max are its temperatures" if name == "temperature" else "leave it out"
            raise OptionError(
                f"{name} is {getattr(self, name)!r}, but the mode is diffusion, which draws whole canvases: {more}, or "
                'take mode="causal".'
            )

    def _check_rules(self) -> None:
        for name in RULES:
            rule = getattr(self, name)
            if rule is None:
                continue
            if not callable(rule):
                raise OptionError(f"{name} is {shown(rule)}; it should be a function of what a step has found.")
            if self.exact or self.mode != "diffusion":
                other = "exact is True" if self.exact else f"mode is {self.mode!r}"
                raise OptionError(f"{other} and {name} is given, which changes how canvases settle: leave one out.")
            try:
                hash(rule)
            except TypeError:
                raise OptionError(
                    f"{name} is {shown(rule)}, which cannot be hashed; it should be a function or a frozen dataclass."
                ) from None

    def _with_effort(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Changes and what the effort among them stands for; what is given by itself wins."""
        if "effort" not in changes:
            return changes
        effort = changes["effort"]
        if not isinstance(effort, str) or effort not in EFFORTS:
            raise OptionError(f"effort is {shown(effort)}; it should be one of {', '.join(EFFORTS)}.")
        if changes.get("exact", self.exact):
            raise OptionError(f"exact is True and effort is {effort!r}; exact mode has the reference's: leave one out.")
        meant = EFFORTS[effort]
        if meant.get("fast") and {"entropy_bound", "entropy_rise", "fast"} & set(changes):
            meant = {}
        if changes.get("fast", self.fast):
            meant = {name: value for name, value in meant.items() if name != "entropy_rise"}
        return {**meant, **changes}

    @property
    def own_rules(self) -> bool:
        """Whether there are rules of the user's own."""
        return any(getattr(self, name) is not None for name in RULES)

    @property
    def causal(self) -> bool:
        """Whether text comes token by token; what "auto" comes to is not known here."""
        return self.mode in ("causal", "speculative")

    @property
    def sampling(self) -> Sampling:
        """How a token is drawn, defaults filled in."""
        given = {name: getattr(self, name) for name in TOKEN_OPTIONS}
        return Sampling(**{name: value for name, value in given.items() if value is not None})

    def _set_sequences(self) -> None:
        """Take one string or token for a list of it."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (list, tuple)) or not all(type(one) is str and one != "" for one in stop):
            raise OptionError(f"stop is {shown(self.stop)}; it should be strings that are not empty.")
        given: Any = self.end_tokens
        tokens = [given] if whole_number(given) is not None else given.tolist() if hasattr(given, "tolist") else given
        whole = [whole_number(one) for one in tokens] if isinstance(tokens, (list, tuple)) else [None]
        if not all(one is not None and 0 <= one <= MAX_INTEGER for one in whole):
            raise OptionError(f"end_tokens is {shown(given)}; it should be token ids.")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "end_tokens", tuple(whole))

    def _set_stop_rules(self) -> None:
        """Fill in the mode's stop rules where none is given."""
        mode = "exact" if self.exact else "fast" if self.fast else "default"
        for name, value in STOP_DEFAULTS[mode].items():
            given = getattr(self, name)
            if self.exact and (given or self.fast):
                other = f"{name} is {given!r}" if given else "fast is True"
                raise OptionError(f"exact is True and {other}; the reference knows no such thing: leave one out.")
            object.__setattr__(self, name, value if given is None else given)

    @classmethod
    def of(cls, config: GenerationConfig, processor: ProcessorConfig) -> GenerationOptions:
        """The checkpoint's own settings."""
        names = {f.name for f in fields(cls)} & {f.name for f in fields(config)}
        return cls(
            **{name: getattr(config, name) for name in names},
            max_tokens=config.max_new_tokens,
            end_tokens=config.eos_token_ids,
            image_tokens=processor.image_tokens,
            max_frames=processor.video_frames,
        )

    def calibrated(self, values: dict[str, Any]) -> GenerationOptions:
        """These options with values for the default mode that were fitted on prompts; exact and fast stay as they are.

        Raises:
            OptionError: a value outside its bounds.
        """
        stop_rules = STOP_DEFAULTS["default"]
        pairs = [(name, value, None if name in stop_rules else getattr(self, name)) for name, value in values.items()]
        return replace(self, **values)._with_fitted(tuple(pairs))

    def _with_fitted(self, fitted: tuple[tuple[str, Any, Any], ...]) -> GenerationOptions:
        object.__setattr__(self, "_fitted", fitted)
        return self

    def override(self, **changes: Any) -> GenerationOptions:
        """These options with some replaced; None leaves one as it is.

        Raises:
            OptionError: an unknown name or a value outside its bounds.
        """
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"the options are {', '.join(known)}."
                raise OptionError(f"{name} is not an option; {hint}")
        changes = self._with_effort({name: value for name, value in changes.items() if value is not None})
        bound = next((name for name in ("entropy_bound", "entropy_rise") if name in changes), None)
        if changes.get("fast", self.fast) and bound:
            raise OptionError(
                f"fast is True and {bound} is {changes[bound]!r}; fast mode accepts by confidence: leave one out."
            )
        mode = changes.get("mode", self.mode)
        other = next((name for name in CANVAS_OPTIONS if name in changes), None)
        if mode == "auto" and other:
            mode = changes["mode"] = "diffusion"  # who gives what is of canvases has chosen
        if mode != "diffusion" and other:
            raise OptionError(
                f"mode is {mode!r} and {other} is {changes[other]!r}, which is of canvases alone: leave one out."
            )
        if {"exact", "fast"} & set(changes):
            plain = not (changes.get("exact", self.exact) or changes.get("fast", self.fast))
            fitted = {name: value if plain else other for name, value, other in self._fitted}
            changes = {**dict.fromkeys(STOP_DEFAULTS["default"]), **fitted, **changes}  # the stop rules follow the mode
        return replace(self, **changes)._with_fitted(self._fitted)


def whole_number(value: Any) -> int | None:
    """A whole number of Python or NumPy as Python's; None: it is none. Truth values are none."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def _real_number(value: Any) -> float | None:
    """A number of Python or NumPy as Python's; None: it is none, or NaN. Truth values are none."""
    if (whole := whole_number(value)) is not None:
        return whole
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    return None if math.isnan(number) else number
