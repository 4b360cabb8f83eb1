"""OpenAI-compatible HTTP endpoints over a `serving.scheduler.Scheduler` (extra: serve)."""
