"""Constrained texts: Python patterns and JSON Schemas, their automata over tokens, and the search for the best text.

`patterns` and `schema` translate into one plain syntax. `dfa` makes an automaton of bytes from it, `language` lets
tokens move through the automaton, and `search` finds the most probable text. Nothing here uses MLX.
"""
