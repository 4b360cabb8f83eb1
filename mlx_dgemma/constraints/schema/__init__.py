"""JSON Schema, translated into expressions: `translate` gives every text of it that is written here."""

from .keywords import SUPPORTED
from .translate import Translation, translate

__all__ = ["SUPPORTED", "Translation", "translate"]
