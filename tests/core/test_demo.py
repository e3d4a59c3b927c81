import types

import numpy as np
import pytest
import torch
from PIL import Image

import ditopt
from ditopt import demo
from ditopt.errors import WorkloadError
from ditopt.progress import silent

WORKLOAD = """
import torch
from ditopt import Workload

def workload():
    frames = lambda result: result.to(torch.uint8).numpy()
    return Workload(torch.nn.Identity().eval(), lambda model, seed: None, frames=frames)
"""


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Fake stages that note what they are given."""
    path, seen = tmp_path / "workload.py", {}
    path.write_text(WORKLOAD)

    def profile(workload, out, progress, spec, source):
        seen.update(profile=out, source=source)

    def plan_from_profile(profile_dir, goal, out, progress, workload):
        seen.update(planned=profile_dir, goal=goal.min_psnr_db, plan=out)
        return "the plan"

    def bench(workload, plan, observe, progress):
        assert plan == "the plan"
        for seed in (7, 8):
            for number, variant in enumerate(("eager", "inductor", "ditopt+plan")):
                observe(variant, seed, torch.full((2, 8, 8, 3), 100 * number + seed))
        return types.SimpleNamespace(rows=())

    def write_report(profile_dir, out, plan, *, workload, progress):
        seen.update(reported=(profile_dir, plan), report=out)

    monkeypatch.setattr(demo, "demo_workload", lambda: str(path))
    for function in (profile, plan_from_profile, bench, write_report):
        monkeypatch.setattr(demo, function.__name__, function)
    return seen


def test_the_stages_hand_on_what_they_wrote(stages, tmp_path):
    out = tmp_path / "new" / "demo"
    found = demo.run_demo(out, 32.0, silent)
    assert stages["profile"] == stages["planned"] == out / "profile"
    assert stages["source"] == f"{tmp_path / 'workload.py'}:workload"
    assert stages["goal"] == 32.0
    assert stages["plan"] == found.plan == out / "plan.yaml"
    assert found.picture == out / "dense_beside_optimized.png"
    assert stages["report"] == found.report == out / "report.html"
    assert stages["reported"] == (out / "profile", out / "plan.yaml")


def test_the_picture_shows_the_first_seed(stages, tmp_path):
    found = demo.run_demo(tmp_path / "demo", 30.0, silent)
    pixels = np.asarray(Image.open(found.picture))
    dense, optimized = pixels[60, 60], pixels[pixels.shape[0] // 2 + 60, 60]
    assert dense.tolist() == [7, 7, 7]
    assert optimized.tolist() == [207, 207, 207]


def test_the_embedded_workload_is_in_the_checkout():
    assert demo.demo_workload().endswith("examples/tiny_video/workload.py")


def test_without_a_checkout_the_demo_says_so(monkeypatch, tmp_path):
    installed = tmp_path / "site-packages" / "ditopt" / "__init__.py"
    monkeypatch.setattr(ditopt, "__file__", str(installed))
    with pytest.raises(WorkloadError, match="Clone the repository and run `make demo`"):
        demo.demo_workload()
