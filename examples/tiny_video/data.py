"""Training clips: a synthetic camera over photographs inside scikit-image and scikit-learn.

Nothing is downloaded. README.md names the photographers and licences. Each photograph gives one
square around its subject; a clip is a window inside that square that pans, zooms or rolls smoothly
for eight frames.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

FRAMES, SIZE = 8, 64  # frames per clip, pixels per side
PHOTO_SIZE = 192  # pixels per side of the stored squares; a window spans about 3/4 of them
MOTIONS = (
    "pan left",
    "pan right",
    "pan up",
    "pan down",
    "zoom in",
    "zoom out",
    "roll right",
    "roll left",
)


@dataclass(frozen=True)
class Scene:
    """A photograph and the square that clips are cut from, in its own pixels."""

    name: str
    left: int
    top: int
    side: int


SCENES = (
    Scene("astronaut", 0, 0, 460),
    Scene("chelsea", 96, 0, 300),
    Scene("coffee", 105, 0, 400),
    Scene("rocket", 107, 0, 427),
    Scene("retina", 0, 0, 1411),
    Scene("camera", 0, 0, 512),
    Scene("china", 0, 0, 427),
    Scene("flower", 90, 0, 427),
)


def _photograph(name: str) -> np.ndarray:
    """One photograph, uint8 [H, W] or [H, W, 3]; sampling alone needs neither package."""
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return load_sample_image(f"{name}.jpg")
    import skimage.data

    load: Callable[[], np.ndarray] = getattr(skimage.data, name)
    return load()


def load_photographs(device: torch.device | str = "cpu", size: int = PHOTO_SIZE) -> Tensor:
    """The squares of all scenes, fp32 [scenes, 3, size, size] in [-1, 1]."""
    squares = []
    for scene in SCENES:
        box = (scene.left, scene.top, scene.left + scene.side, scene.top + scene.side)
        image = Image.fromarray(_photograph(scene.name)).convert("RGB")
        # Antialiased, so that fine texture fades instead of flickering between frames.
        square = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
        squares.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
    return torch.stack(squares).to(device).float() / 127.5 - 1


def camera_path(motion: Tensor, frames: int, generator: torch.Generator | None = None) -> Tensor:
    """The windows that a camera sees, as affine maps fp32 [B, frames, 2, 3].

    A map goes from window to photograph, both spanning [-1, 1]. Position, size and speed are drawn
    at random, in ranges that keep the window inside the photograph (the corners of a rolled window
    may leave it; the border is repeated there).

    Args:
        motion: indices into MOTIONS, [B].
        frames: number of frames.
        generator: source of the randomness, on the device of `motion`.
    """
    device = motion.device

    def uniform(low: float, high: float) -> Tensor:
        random = torch.rand(motion.shape[0], 1, device=device, generator=generator)
        return low + (high - low) * random

    def along(kind: str) -> Tensor:
        """[B, 1]: 1 where the motion is `kind`, -1 where it is the opposite, which follows it."""
        first = MOTIONS.index(kind)
        return ((motion == first).float() - (motion == first + 1).float())[:, None]

    time = uniform(0.75, 1.25) * torch.linspace(-1, 1, frames, device=device)  # [B, frames]
    x = uniform(-0.07, 0.07) - 0.14 * time * along("pan left")
    y = uniform(-0.07, 0.07) - 0.14 * time * along("pan up")
    half = uniform(0.68, 0.78) * torch.exp(-0.2 * time * along("zoom in"))
    angle = math.radians(14) * time * along("roll right")
    cos, sin = half * angle.cos(), half * angle.sin()
    return torch.stack((cos, -sin, x, sin, cos, y), dim=-1).unflatten(-1, (2, 3))


def make_clips(
    photographs: Tensor,
    scene: Tensor,
    motion: Tensor,
    frames: int = FRAMES,
    size: int = SIZE,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Clips fp32 [B, 3, frames, size, size] in [-1, 1], on the photographs' device.

    Args:
        photographs: what `load_photographs` returns.
        scene: indices into SCENES, [B].
        motion: indices into MOTIONS, [B].
        frames: frames per clip.
        size: pixels per side.
        generator: source of the camera's randomness, on the same device.
    """
    path = camera_path(motion, frames, generator)
    fine = 2 * size  # sampled at twice the size, then averaged: antialiasing
    shape = [path.shape[0] * frames, 3, fine, fine]
    grid = F.affine_grid(path.flatten(0, 1), shape, align_corners=False)
    # The frames of a clip are stacked into one tall picture, so that a photograph is not repeated.
    grid = grid.view(-1, frames * fine, fine, 2)
    clip = F.grid_sample(photographs[scene], grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(clip, 2).view(-1, 3, frames, size, size)
