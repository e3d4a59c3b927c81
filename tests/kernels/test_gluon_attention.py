"""The Gluon kernel: its configurations anywhere; on a Hopper GPU every one of them against fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml

from ditopt.kernels.block_sparse_attention import configs
from ditopt.kernels.block_sparse_attention.configs import HopperConfig, hopper_config

from .barriers import addresses, keep_their_memory

Build = Callable[..., Any]
WIDTHS = (32, 64, 80, 96, 128)  # channels in the tiles of `hopper.split_head_size`
SHARED = 228 * 1024  # of a multiprocessor; a program takes 1 KiB more than it asks for
TABLES = yaml.safe_load(configs.FILE.read_text())
GPUS = [gpu for gpu, table in TABLES.items() if "hopper" in table]
NO_HOPPER = not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)
CASES = [  # block_q, block_k, head size: every entry of configs.yaml, and sizes between two
    *((128, 128, d) for d in (128, 112, 96, 80, 72, 64, 32)),
    *((128, 64, d) for d in (128, 96, 72, 64, 32)),
    *((64, 128, d) for d in (128, 96, 64, 32)),
    *((64, 64, d) for d in (128, 104, 96, 72, 64, 32)),
    (256, 128, 64),
]
BOTH = [(blocks, torch.bfloat16) for blocks in CASES] + [
    (blocks, torch.float16) for blocks in (*CASES[:7], (64, 64, 128))
]
STEPS = (0.0, 0.5, 2.0, 7.5, 8.5, 30.0, -3.0)  # powers of two by which a row's maximum grows a tile


@pytest.mark.parametrize("gpu", GPUS)
def test_every_entry_fits_and_is_used(gpu: str) -> None:
    entries = {HopperConfig(**e) for e in TABLES[gpu]["hopper"]}
    used = set()
    for consumers in (1, 2):
        for block_k in (64, 128):
            for d in range(16, 129, 8):
                config = hopper_config(gpu, consumers, block_k, d)
                width = next(w for w in WIDTHS if w >= d)
                rows = config.consumers * config.q_stages * 64
                rows += config.keys * (config.k_stages + config.v_stages)
                asked = rows * width * 2 + 1024  # numbers of tiles, barriers, and what they fill
                assert (asked + 1024) * config.programs_per_processor <= SHARED, config
                assert min(config.k_stages, config.v_stages) >= 2, config
                assert config.keys in (block_k, block_k // 2), config
                # One warp loads, but registers are given away by warpgroups of 128 threads.
                threads = 128 * (config.consumers + 1) * config.programs_per_processor
                assert threads * (config.max_registers or 168) <= 65536, config
                used.add(config)
    assert used == entries


@pytest.mark.parametrize("gpu", GPUS)
def test_options_of_every_entry_are_ones_the_kernel_has(gpu: str) -> None:
    for entry in TABLES[gpu]["hopper"]:
        config = HopperConfig(**entry)
        assert config.rescale in ("soon", "late", "lazy")
        assert config.consumers == 2 or not config.pingpong
        assert config.overlap or (config.rescale == "lazy" and not config.pingpong)
    for d in range(16, 129, 8):
        for block_k in (64, 128):
            config = hopper_config(gpu, 1, block_k, d)
            if config.q_stages == 0:  # a query tile must be as large as one of V, and of one part
                assert config.q_registers
                assert config.keys == 64
                assert d <= 64 or d > 96
            assert hopper_config(gpu, 2, block_k, d).q_stages > 0


@pytest.mark.parametrize(("launched", "first", "second"), [(None, 240, 240), (80, 112, 104)])
def test_registers_of_consumers_are_what_the_producer_leaves(
    launched: int | None, first: int, second: int
) -> None:
    """A program is launched with equal registers; a producer's 24 leave the rest, in eights."""
    entry = {"consumers": 2, "block_k": 128, "channels": 64}
    config = HopperConfig(**entry, k_stages=2, v_stages=2, q_stages=1, max_registers=launched)
    assert config.worker_registers == second
    assert 3 * (launched or 168) - 24 - config.worker_registers == first


def test_widths_are_the_launcher_s() -> None:
    pytest.importorskip("triton.experimental.gluon")
    from ditopt.kernels.block_sparse_attention.hopper import split_head_size

    for d in range(16, 129, 8):
        assert sum(split_head_size(d)) == next(w for w in WIDTHS if w >= d)


@pytest.mark.parametrize(
    "access",
    [
        "@%p4 st.shared.b32 [ %r2 + {} ], %r3;",
        "ld.shared.b32 \t%r4, [%r2+{}];",
        "ld.shared.v2.b32 \t{{%r4, %r5}}, [%r2+{}];",
        "st.shared.v4.b32 \t[global_smem+{}], {{%r4, %r5, %r6, %r7}};",
    ],
)
def test_other_things_in_a_barrier_s_memory_are_seen(access: str) -> None:
    made = "add.s32 \t%r1, %r9, 4096;\n\t@%p1 mbarrier.init.shared::cta.b64 [%r1], 1;\n\t"
    made += "ld.shared.b64 \t%rd1, [global_smem+8];\n\tadd.s32 \t%r2, %r9, 4000;\n\t"
    base = 0 if "global" in access else 4000
    for start, fits in ((4080 - base, True), (4104 - base, True), (4100 - base, False)):
        ptx = made + access.format(start)
        assert addresses(ptx)[0] == [4096]
        if fits:
            keep_their_memory(ptx, 1)
        else:
            with pytest.raises(AssertionError, match="4096"):
                keep_their_memory(ptx, 1)
    with pytest.raises(AssertionError):
        keep_their_memory(made, 2)


def of(build_case: Build, case: tuple[int, int, int], dtype: torch.dtype) -> Any:
    """Two sequences of three heads, nothing a multiple of a block, rings filled several times."""
    block_q, block_k, d = case
    return build_case((2, 3, 333, 1500, d, block_q, block_k), dtype=dtype)


def check(case: Any) -> None:
    """Output and LSE of the kernel within what its arithmetic may lose, number by number."""
    from ditopt.kernels.block_sparse_attention import hopper

    args = case.to("cuda").args[:8]
    assert hopper.reason_to_decline(args[0], case.block_q, case.block_k) is None
    truth, true_lse = case.truth()
    out, lse = hopper.forward(*args, return_lse=True)
    assert truth.holds(out)
    assert true_lse.holds(lse)
    assert truth.holds(hopper.forward(*args)[0])  # another program, which leaves the LSE out
    for (_, _, constants), program in hopper._launch._programs.items():
        assert program.n_spills == 0
        k_stages, v_stages, q_stages, _, _, pingpong = constants[6:12]
        keep_their_memory(program.asm["ptx"], 2 * (k_stages + v_stages + q_stages + pingpong))


@pytest.mark.gpu
@pytest.mark.skipif(NO_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("blocks", "dtype"), BOTH)
def test_every_entry_is_within_the_bound(
    blocks: tuple[int, int, int], dtype: torch.dtype, build_case: Build
) -> None:
    check(of(build_case, blocks, dtype))


@pytest.mark.gpu
@pytest.mark.skipif(NO_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("n_k", [1409, 1472, 1473, 1500, 1536])  # of the last 128: 1, 64, 65, ...
@pytest.mark.parametrize("blocks", [case for case in CASES if case[1] == 128])
def test_last_entries_may_have_any_length(
    blocks: tuple[int, int, int], n_k: int, build_case: Build
) -> None:
    """Half of it may have no key at all, and there are rows with no entry but the last block."""
    block_q, block_k, d = blocks
    check(build_case((1, 3, 333, n_k, d, block_q, block_k), dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(NO_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("blocks", "dtype"), BOTH)
def test_maxima_may_keep_growing(
    blocks: tuple[int, int, int], dtype: torch.dtype, build_case: Build
) -> None:
    """Lists are walked from their ends, so scores grow towards the first key block.

    In one half of the rows neighbours grow by different steps, so that a warp has factors that are
    1 and factors that are not; in the other half 64 rows share one.
    """
    case = of(build_case, blocks, dtype)
    rows = torch.arange(case.q.shape[2])
    steps = torch.tensor(STEPS)[torch.where(rows < 168, rows, rows // 64) % len(STEPS)]
    block = torch.arange(case.k.shape[2]) // case.block_k
    case.q[..., 0] = (steps / (case.scale * math.log2(math.e))).to(dtype)
    case.k[..., 0] = (block.max() - block).to(dtype)
    check(case)


@pytest.mark.gpu
@pytest.mark.skipif(NO_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("wrong", [99, -1])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("blocks", CASES)
def test_a_first_tile_without_keys_leaves_the_others(
    blocks: tuple[int, int, int], sign: int, wrong: int, build_case: Build
) -> None:
    """A last id that does not exist masks the tile from which m comes; later scores are far off.

    All keys fill their blocks: the kernel masks the last entry of a list alone.
    """
    block_q, block_k, d = blocks
    case = build_case((2, 3, 333, 1536, d, block_q, block_k), dtype=torch.bfloat16)
    case.q[..., 0] = sign * 12.0 / case.scale
    case.k[..., 0] = 1.0
    case.ids = torch.nn.functional.pad(case.ids, (0, 1))
    case.ids.scatter_(-1, case.counts[..., None].long(), wrong)
    truth, true_lse = case.truth()
    case.counts = case.counts + 1
    from ditopt.kernels.block_sparse_attention import hopper

    out, lse = hopper.forward(*case.to("cuda").args[:8], return_lse=True)
    assert truth.holds(out)
    assert true_lse.holds(lse)


@pytest.mark.gpu
@pytest.mark.skipif(NO_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("blocks", CASES)
def test_lists_without_room_are_empty(blocks: tuple[int, int, int], build_case: Build) -> None:
    from ditopt.kernels.block_sparse_attention import hopper

    case = of(build_case, blocks, torch.bfloat16)
    case.counts = torch.zeros_like(case.counts)
    for ids in (case.ids, case.ids[..., :0]):
        case.ids = ids
        out, lse = hopper.forward(*case.to("cuda").args[:8], return_lse=True)
        assert not out.any()
        assert bool((lse == -math.inf).all())


@pytest.mark.gpu
@pytest.mark.skipif(NO_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("blocks", CASES)
def test_every_launch_writes_every_tile(blocks: tuple[int, int, int], build_case: Build) -> None:
    """And the same numbers. Many programs, and more tiles than programs, 50 times."""
    from ditopt.kernels.block_sparse_attention import hopper

    block_q, block_k, d = blocks
    case = build_case((1, 12, 4096, 1500, d, block_q, block_k), dtype=torch.bfloat16).to("cuda")
    out = hopper.forward(*case.args[:8])[0]
    assert not out.isnan().any()
    for _ in range(50):
        torch.full_like(out, math.nan)  # whose memory is the next output's
        assert torch.equal(hopper.forward(*case.args[:8])[0], out)
