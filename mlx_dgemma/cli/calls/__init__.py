"""A call of a running server as a script makes it: what it imports is counted in milliseconds."""
