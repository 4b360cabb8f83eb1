"""Requests together: the scheduler and the cache of prefixes."""
