"""Data split by columns."""
