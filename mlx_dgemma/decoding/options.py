"""The block loop: canvases of noise become blocks of text. It knows no text, terminal or HTTP.

Three scopes: a step is one forward over the canvas, a block is one canvas until it settles, a commit
encodes the block into the prefix. Whatever is watched and whoever is beside, the draws are the same: every
random number comes from a key that depends on the job's seed, the block and the step alone.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..model.config import GenerationConfig, ProcessorConfig
from ..prompt.images import check_budget

if TYPE_CHECKING:
    pass


# How early a canvas is taken, by mode: bench/RESULTS.md has what that costs and saves.
SETTLE: dict[str, dict[str, Any]] = {
    "exact": {"certainty_threshold": 0, "patience": 0},
    "default": {"certainty_threshold": 0.1, "patience": 2},
    "fast": {"certainty_threshold": 0.3, "patience": 2},
}


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate. Precedence: explicit option > the checkpoint's generation_config > these defaults.

    Raises:
        OptionError: a value outside its bounds.
    """

    max_tokens: int = 256  # the text is cut there; the canvas stays whole
    stop: tuple[str, ...] = ()  # the text ends before the first of these strings
    max_denoising_steps: int = 48  # steps after which a canvas that has not settled is taken as it is
    entropy_bound: float = 0.1  # nats; higher accepts more positions at once
    t_min: float = 0.4  # temperature at the last step
    t_max: float = 0.8  # temperature at the first step
    stability_threshold: int = 1  # earlier steps whose argmax must be the same
    confidence_threshold: float = 0.005  # nats; mean entropy below which a canvas has settled
    exact: bool = False  # settle as the reference does, by the two thresholds above over the whole canvas
    fast: bool = False  # keep best tokens for good once they are confident, instead of drawing by entropy_bound
    certainty_threshold: float | None = None  # nats; settled where no position is above (0.1, fast 0.3; 0: never)
    patience: int | None = None  # steps without change that settle a canvas (2; 0: never)
    end_tokens: tuple[int, ...] = (1,)  # any of these ends the text
    prefill_chunk: int | None = None  # prompt tokens encoded at once; None: `fitting_chunk`
    image_tokens: int = 280  # the most soft tokens of a picture: 70, 140, 280, 560 or 1120
    fps: float = 1.0  # frames looked at in a second of video
    max_frames: int = 32  # frames looked at in a whole video

    def __post_init__(self):
        for name in ("exact", "fast"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is {getattr(self, name)!r}; it should be true or false.")
        mode = "exact" if self.exact else "fast" if self.fast else "default"
        for name, value in SETTLE[mode].items():
            given = getattr(self, name)
            if self.exact and (given or self.fast):
                other = f"{name} is {given!r}" if given else "fast is True"
                raise OptionError(f"exact is True and {other}; the reference knows no such thing: leave one out.")
            object.__setattr__(self, name, value if given is None else given)
        for name, kind, low in (
            ("max_tokens", int, 1),
            ("max_denoising_steps", int, 1),
            ("entropy_bound", float, 0),
            ("t_min", float, 0),
            ("t_max", float, self.t_min),
            ("stability_threshold", int, 0),
            ("confidence_threshold", float, 0),
            ("certainty_threshold", float, 0),
            ("patience", int, 0),
            ("prefill_chunk", int, 1),
            ("max_frames", int, 1),
            ("fps", float, 0),
        ):
            value = getattr(self, name)
            if name == "prefill_chunk" and value is None:
                continue
            number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
            if not number or not low <= value < float("inf"):
                noun = "a whole number" if kind is int else "a number"
                bound = f"t_min = {low}" if name == "t_max" else low
                raise OptionError(f"{name} is {value!r}; it should be {noun}, at least {bound}.")
        for name in ("t_max", "fps"):
            if getattr(self, name) == 0:
                raise OptionError(f"{name} is {getattr(self, name)!r}; it should be above 0.")
        check_budget(self.image_tokens)
        for name, single, noun in (("stop", str, "strings that are not empty"), ("end_tokens", int, "token ids")):
            given = getattr(self, name)
            values = (given,) if isinstance(given, single) else given
            if not isinstance(values, (list, tuple)) or not all(type(one) is single and one != "" for one in values):
                raise OptionError(f"{name} is {given!r}; it should be {noun}.")
            object.__setattr__(self, name, tuple(values))

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
        changes = {name: value for name, value in changes.items() if value is not None}
        if changes.get("fast", self.fast) and "entropy_bound" in changes:
            raise OptionError(
                f"fast is True and entropy_bound is {changes['entropy_bound']!r}; "
                "fast mode accepts by confidence: leave one out."
            )
        if {"exact", "fast"} & set(changes):
            changes = {**dict.fromkeys(SETTLE["default"]), **changes}  # they follow the mode
        return replace(self, **changes)
