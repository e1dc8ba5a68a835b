"""Using a finished run: its results, a client's own model, a newcomer, what users ask."""
