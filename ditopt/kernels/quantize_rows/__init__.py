"""Rows rounded to 8 bits behind an activation and a concatenation, in one pass."""
