"""Launch configurations of the plain Triton kernel; Gluon's are in test_gluon_attention."""

from __future__ import annotations

from itertools import product

import pytest
import yaml

from ditopt.kernels.block_sparse_attention.configs import FILE, plain_config

SHARED = 227 * 1024  # bytes of one program on sm_90
TABLES = yaml.safe_load(FILE.read_text())
GPUS = [gpu for gpu, table in TABLES.items() if "plain" in table]
WIDTHS = (32, 64, 80, 96, 128)  # channels as they are loaded


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("d", [16, 32, 40, 64, 72, 80, 88, 96, 112, 128])
@pytest.mark.parametrize("gpu", GPUS)
def test_tuned_tiles_can_be_launched(gpu: str, d: int, options: bool) -> None:
    width = next(width for width in WIDTHS if d <= width)
    for block_q, block_k in product((16, 32, 64, 128, 256), (16, 32, 64, 128)):
        config = plain_config(gpu, block_q, block_k, d, options=options)
        assert block_q % config.block_m == 0, config
        assert config.block_n & (config.block_n - 1) == 0, config
        assert block_k % config.block_n == 0 or block_k < 64, config
        assert config.block_m // config.num_warps in (16, 32), config  # rows of a warp's products
        assert config.num_stages in range(3, 6), config
        # The queries, and K and V of two stages less: one loads ids, one computes (triton 3.6.0).
        rows = config.block_m + 2 * config.block_n * (config.num_stages - 2)
        assert 2 * width * rows <= SHARED, config
        if options:
            assert not config.lazy, config
            assert config.num_warps <= 4 or config.block_n > 64, config


@pytest.mark.parametrize("gpu", GPUS)
def test_every_entry_is_used(gpu: str) -> None:
    for entry in TABLES[gpu]["plain"]:
        config = plain_config(gpu, entry["block_q"], 128, entry["channels"])
        shape = (entry["block_m"], entry["block_n"], entry["num_warps"], entry["num_stages"])
        assert (config.block_m, config.block_n, config.num_warps, config.num_stages) == shape
