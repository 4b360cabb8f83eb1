"""Serving of concurrent requests: the scheduler and the prefix cache."""
