"""Engines: a model with its plan as a folder that another process loads and runs."""
