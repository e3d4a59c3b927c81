"""Token geometry: which part of a sequence is the grid of latent tokens, and which is text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from pydantic import ConfigDict


@dataclass(frozen=True)
class TokenLayout:
    """A sequence ``text_before | frames x height x width | text_after``.

    Grid tokens lie in raster order: frame, then row, then column, so that the token at
    ``(frame, row, column)`` stands at ``text_before + (frame * height + row) * width + column``.

    Attributes:
        frames: latent frames; 1 for an image.
        height: token rows of one frame.
        width: tokens of one row.
        text_before: text or other conditioning tokens before the grid.
        text_after: the same after it.
    """

    # Plan files hold layouts, and unknown keys are refused there.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    frames: int
    height: int
    width: int
    text_before: int = 0
    text_after: int = 0

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("text_before", "text_after"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")

    @property
    def tokens(self) -> int:
        """Tokens of the grid, without text."""
        return self.frames * self.height * self.width

    @property
    def text(self) -> int:
        """Text tokens, before and after the grid together."""
        return self.text_before + self.text_after

    @property
    def total(self) -> int:
        """Tokens of the whole sequence."""
        return self.text + self.tokens

    def fit(self, total: int) -> TokenLayout:
        """The same grid in a sequence of `total` tokens; the text takes up what remains.

        Prompts of different length share a plan this way.

        Raises:
            ValueError: the grid does not fit, or text lies on both sides and its share is unknown.
        """
        if total == self.total:
            return self
        text = total - self.tokens
        if text < 0 or (self.text_before and self.text_after):
            raise ValueError(
                f"a sequence of {total} tokens does not hold a grid of {self.frames} x "
                f"{self.height} x {self.width} = {self.tokens} tokens with {self.text_before} text "
                f"tokens before and {self.text_after} after it"
            )
        if self.text_before:
            return replace(self, text_before=text)
        return replace(self, text_after=text)
