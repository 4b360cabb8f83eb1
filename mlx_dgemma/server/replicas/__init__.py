"""Data parallel: requests spread over servers that each hold the model."""
