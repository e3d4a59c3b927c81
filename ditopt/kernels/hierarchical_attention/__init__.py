"""Attention whose blocks are chosen level by level: cost N log N."""
