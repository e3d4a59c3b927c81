"""A larger trained video model: diffusers' WanTransformer3DModel at 16,384 tokens."""
