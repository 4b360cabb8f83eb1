"""Regular languages: patterns, JSON Schemas, automata over tokens, and the best text of a canvas."""
