"""Prompts in, answers out: messages, the chat template, pictures, video, and the reader of answers."""
