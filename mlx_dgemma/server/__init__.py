"""OpenAI-compatible HTTP over a `schedule.Scheduler` (extra: serve)."""
