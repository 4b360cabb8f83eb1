"""OpenAI-compatible HTTP over a `schedule.Scheduler` (extra: serve)."""

from __future__ import annotations
