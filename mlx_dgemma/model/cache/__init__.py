"""Other ways to hold the keys and values of the prefix."""
