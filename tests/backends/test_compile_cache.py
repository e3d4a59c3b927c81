"""What was compiled once is found again by the next process."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import torch
from torch import nn
from torch._dynamo.utils import counters

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.layer(x).relu()

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(14))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

torch.manual_seed(0)
model = Model()
with torch.no_grad():
    torch.compile(model, backend="ditopt")(torch.ones(1, 8))
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


def hits_and_misses(cache: str) -> list[int]:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return [int(word) for word in done.stdout.split()[-2:]]


def test_a_second_process_compiles_nothing(tmp_path):
    hits, compiled = hits_and_misses(str(tmp_path))
    assert compiled >= 1
    assert hits_and_misses(str(tmp_path)) == [hits + compiled, 0]
