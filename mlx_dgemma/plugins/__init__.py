"""Models for other programs. Each module imports the program that it is for, and only that program imports it."""
