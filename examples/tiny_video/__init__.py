"""The embedded default model: a small video Diffusion Transformer with trained weights."""
