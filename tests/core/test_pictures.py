import numpy as np
import pytest
from PIL import Image

from ditopt.errors import WorkloadError
from ditopt.pictures import write_comparison


def frames(value, count=10):
    return np.full((count, 16, 24, 3), value, dtype=np.uint8)


def test_rows_stand_below_each_other(tmp_path):
    write_comparison(tmp_path / "sheet.png", {"dense": frames(10), "optimized": frames(200)})
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    # six of ten frames, 24 x 16 pixels enlarged six times, a margin of 4 around each
    assert pixels.shape == (2 * (96 + 4 + 16) + 4, 6 * (144 + 4) + 4, 3)
    assert (pixels[60, 60] == 10).all()
    assert (pixels[60 + 116, 60] == 200).all()


@pytest.mark.parametrize(
    ("optimized", "message"),
    [
        (frames(0).astype(np.float32), r"uint8 \[F, H, W, 3\]; got float32"),
        (frames(0, count=3), r"'optimized' differ in shape: \[3, 16, 24, 3\]"),
    ],
)
def test_other_frames_are_refused(optimized, message, tmp_path):
    with pytest.raises(WorkloadError, match=message):
        write_comparison(tmp_path / "sheet.png", {"dense": frames(0), "optimized": optimized})
    assert not list(tmp_path.iterdir())
