"""LoRA adapters of peft on a published architecture: chosen, scaled, merged, taken away.

The text-to-image model's projections are fused into one matrix by ditopt, so a merge that went
unnoticed would give the old result.
"""

import pytest
import torch

from ditopt.errors import DitoptWarning

from .models import build, first_tensor

peft = pytest.importorskip("peft")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_every_change_of_adapters_is_followed(recwarn):
    torch._dynamo.reset()
    model, arguments = build("flux")
    torch.manual_seed(1)
    for name in ("a", "b"):
        config = peft.LoraConfig(
            r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]
        )
        model.add_adapter(config, adapter_name=name)
    model.eval().requires_grad_(False)
    compiled = torch.compile(model, backend="ditopt_eager")
    changes = {
        "a": lambda: model.set_adapter("a"),
        "both, scaled": lambda: model.set_adapters(["a", "b"], [0.5, 2.0]),
        "scaled again": lambda: model.set_adapters(["a", "b"], [0.25, 1.5]),
        "merged": model.fuse_lora,
        "taken out": model.unfuse_lora,
        "off": model.disable_adapters,
    }
    before = None
    with torch.no_grad():
        for change, apply in changes.items():
            apply()
            eager = first_tensor(model(**arguments))
            assert before is None or change == "merged" or not torch.equal(eager, before), change
            assert torch.equal(first_tensor(compiled(**arguments)), eager), change
            before = eager
    assert not [w for w in recwarn if issubclass(w.category, DitoptWarning)]
