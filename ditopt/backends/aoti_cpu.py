"""The C++ kernel of block-sparse attention inside AOTInductor's own C++ (CPU, float32).

AOTInductor calls an operator that it does not know by a C function, which it wants declared. What
is declared here is the whole function with the kernel's source before it, so that the program has
the executor that the compiled model has, and needs nothing beside it where it runs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ditopt.graph import arguments, fake_value
from ditopt.kernels.block_sparse_attention import cpu_native
from ditopt.kernels.block_sparse_attention import ops as _ops  # noqa: F401  (registers it)

if TYPE_CHECKING:
    from torch import fx

OPERATOR = torch.ops.ditopt.block_sparse_attention.default

_NAME = "aoti_torch_cpu_block_sparse_attention"
_SIGNATURE = f"""AOTITorchError {_NAME}(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle counts,
    AtenTensorHandle ids, int64_t block_q, int64_t block_k, double scale,
    AtenTensorHandle* result)"""

# The wrapper that AOTInductor writes is compiled at -O1; vectors and OpenMP are on.
_BEFORE = """
#include <omp.h>
#pragma GCC push_options
#pragma GCC optimize("O3", "finite-math-only", "no-math-errno", "no-trapping-math")
#pragma GCC optimize("fp-contract=fast")
namespace ditopt_kernel {
"""
_BEHIND = """
}  // namespace ditopt_kernel
#pragma GCC pop_options
"""
_BODY = """ {
  ditopt_kernel::Call call{};
  int64_t *sizes, *key_sizes, *id_sizes, *count_sizes;
  const AtenTensorHandle given[] = {q, k, v, counts, ids};
  void* data[5];
  int64_t* strides[5];
  for (int i = 0; i < 5; ++i)
    if (aoti_torch_get_data_ptr(given[i], data + i) ||
        aoti_torch_get_strides(given[i], strides + i))
      return 1;
  if (aoti_torch_get_sizes(q, &sizes) || aoti_torch_get_sizes(k, &key_sizes) ||
      aoti_torch_get_sizes(counts, &count_sizes) || aoti_torch_get_sizes(ids, &id_sizes))
    return 1;
  for (int i = 0; i < 3; ++i)
    if (strides[i][3] != 1) return 1;
  if (strides[4][3] != 1 && id_sizes[3] > 1) return 1;
  const int64_t shape[] = {sizes[0], sizes[1], sizes[2], sizes[3]};
  const int64_t layout[] = {sizes[1] * sizes[2] * sizes[3], sizes[3], sizes[1] * sizes[3], 1};
  void* out;
  if (aoti_torch_empty_strided(4, shape, layout, aoti_torch_dtype_float32(),
                               aoti_torch_device_type_cpu(), 0, result) ||
      aoti_torch_get_data_ptr(*result, &out))
    return 1;
  call.q = static_cast<const float*>(data[0]);
  call.k = static_cast<const float*>(data[1]);
  call.v = static_cast<const float*>(data[2]);
  call.counts = static_cast<const int32_t*>(data[3]);
  call.ids = static_cast<const int32_t*>(data[4]);
  call.out = static_cast<float*>(out);
  for (int i = 0; i < 3; ++i) {
    call.q_strides[i] = strides[0][i];
    call.k_strides[i] = strides[1][i];
    call.v_strides[i] = strides[2][i];
    call.out_strides[i] = layout[i];
    call.count_strides[i] = i < 2 && count_sizes[i] == 1 ? 0 : strides[3][i];
    call.id_strides[i] = i < 2 && id_sizes[i] == 1 ? 0 : strides[4][i];
  }
  call.batch = sizes[0], call.heads = sizes[1], call.n_q = sizes[2], call.d = sizes[3];
  call.n_k = key_sizes[2], call.block_q = block_q, call.block_k = block_k;
  call.width = id_sizes[3], call.scale = static_cast<float>(scale);
  call.threads = omp_get_max_threads();
  ditopt_kernel::ditopt_block_sparse_attention(&call);
  return 0;
}"""


def reason_to_decline(node: fx.Node) -> str | None:
    """Why this call of the operator cannot have the kernel inside, or None where it can."""
    tensors = [fake_value(x) for x in arguments(node)[:5]]
    q, k, v = tensors[:3]
    if q.device.type != "cpu" or q.dtype != torch.float32:
        return f"the C++ kernel in a program takes float32 on a CPU, q is {q.dtype} on {q.device}"
    if any(x.stride(-1) != 1 for x in (q, k, v, tensors[4])) or q.shape[-1] != v.shape[-1]:
        return "the C++ kernel in a program wants adjacent channels, as many in v as in q"
    return cpu_native.reason_to_decline(q)


def shims() -> dict[Any, list[str]]:
    """What Inductor's `aot_inductor.custom_ops_to_c_shims` is to be for such programs."""
    return {OPERATOR: [_text()]}


@lru_cache(maxsize=1)
def _text() -> str:
    source = cpu_native.FILE.read_text()
    headers = "\n".join(line for line in source.splitlines() if line.startswith("#include"))
    # It is pasted behind the word `extern`, inside `extern "C" { ... }`.
    return (
        f"{_SIGNATURE};\n}}\n{headers}\n{_BEFORE}{source}{_BEHIND}\n"
        f'extern "C" {{\n{_SIGNATURE}{_BODY}\n'
    )
