"""Lowerings of canonical graphs: `eager` (the oracle) and `inductor`."""
