"""Which layers a device takes, with the device's answers put in its mouth."""

from typing import Any

import pytest
import torch

from ditopt.quantization.limits import missing_hardware, refused_shape

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("name", "capability", "reason"),
    [
        ("fp8_row", (8, 0), "fp8_row needs compute capability 8.9, the device has 8.0"),
        ("fp8_row", (8, 9), None),
        ("fp8_row", (9, 0), None),
        ("int8_row", (7, 0), "int8_row needs compute capability 7.5, the device has 7.0"),
        ("int8_row", (8, 0), None),
        ("int4_group", (7, 0), None),
    ],
)
def test_hardware(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: Any, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert missing_hardware(name, CUDA) == reason


def test_hardware_of_other_devices() -> None:
    assert missing_hardware("int8_row", CPU) is None
    assert missing_hardware("fp8_row", CPU) == "the CPU has no fp8 matrix product"
    wanted = "no 8-bit matrix product is known for mps"
    assert missing_hardware("int8_row", torch.device("mps")) == wanted


@pytest.mark.parametrize(
    ("name", "rows", "k", "n", "dtype", "reason"),
    [
        ("fp8_row", 1, 16, 32, BF16, None),
        ("fp8_row", 9, 24, 32, BF16, "K = 24 is no multiple of 16, as fp8_row on CUDA needs"),
        ("fp8_row", 9, 32, 40, BF16, "N = 40 is no multiple of 16, as fp8_row on CUDA needs"),
        (
            "fp8_row",
            9,
            32,
            32,
            torch.float32,
            "the layer computes in float32, and the fp8 product gives bfloat16",
        ),
        ("int8_row", 17, 24, 40, torch.float32, None),
        ("int8_row", 17, 20, 40, BF16, "K = 20 is no multiple of 8, as int8_row on CUDA needs"),
        ("int8_row", 16, 24, 40, BF16, "16 rows: int8_row on CUDA needs more than 16"),
        ("codebook", 1, 5, 7, BF16, None),
    ],
)
def test_shapes(
    name: str, rows: int, k: int, n: int, dtype: torch.dtype, reason: str | None
) -> None:
    assert refused_shape(name, CUDA, rows, k, n, dtype) == reason
    assert refused_shape(name, CPU, rows, k, n, dtype) is None


def test_a_product_that_torch_gets_wrong() -> None:
    wanted = "K = 1: torch's integer product on the CPU gives zeros"
    assert refused_shape("int8_row", CPU, 9, 1, 11, BF16) == wanted
