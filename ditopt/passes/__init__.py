"""Rewrites of canonical graphs, one idea per file; `ditopt.pipeline` lists them in order."""
