"""Passes that are traced once and replayed, which saves the host from building their graphs."""
