"""Types of options' values."""

from __future__ import annotations

from typing import Any

import click

from ...prompt.paths import local_path


class IntegerRange(click.IntRange):
    """`click.IntRange` that calls its values whole numbers in error messages."""

    name = "whole number"


class NumberRange(click.FloatRange):
    """`click.FloatRange` that calls its values numbers in error messages."""

    name = "number"


class CanvasSize(click.ParamType):
    """auto, full or a number of tokens."""

    name = "canvas"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A word as it is, a number as an integer."""
        if value in ("auto", "full"):
            return value
        if not str(value).isdecimal() or not 1 <= int(value) < 2**31:
            self.fail(f"{value} is not auto, full or a whole number, at least 1.", param, ctx)
        return int(value)


class MediaPath(click.Path):
    """A path, also a `file:` address or one as a terminal writes it, that explains why a web address is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check the path."""
        if isinstance(value, str) and value.lower().startswith(("http://", "https://")):
            self.fail(f"{value} is a web address; download the file and give its path.", param, ctx)
        return super().convert(local_path(value) if isinstance(value, str) else value, param, ctx)
