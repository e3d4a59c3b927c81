"""Linear attention over the key blocks that block-sparse attention leaves out."""
