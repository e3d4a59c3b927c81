import io
import json

import pytest
from rich.console import Console

from ditopt.report import Decision, PassReport, decision_table

APPLIED = Decision(
    "blocks.0.attn1#0", "fuse", True, "q, k, v read one tensor", ("linear",), 0.0, 1.5
)
DECLINED = Decision("blocks[1]", "fuse", False, "k reads the text")


def test_a_decision_needs_a_reason():
    with pytest.raises(ValueError, match="decision of 'fuse' at 'model' has no reason"):
        Decision("model", "fuse", True, "")


def test_a_report_is_modified_when_something_was_applied():
    assert PassReport("fuse", "blocks.0", 1.0, (DECLINED, APPLIED)).modified
    assert not PassReport("fuse", "blocks.0", 1.0, (DECLINED,)).modified


def test_json_holds_every_field():
    report = json.loads(json.dumps(PassReport("fuse", "prefix", 0.5, (APPLIED,)).to_json()))
    assert report["pass"] == "fuse"
    assert report["modified"] is True
    assert report["decisions"][0] == {
        "site": "blocks.0.attn1#0",
        "rule": "fuse",
        "applied": True,
        "reason": "q, k, v read one tensor",
        "nodes": ["linear"],
        "est_error": 0.0,
        "est_saving_ms": 1.5,
    }


def test_table_prints_site_ids_literally():
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(decision_table([APPLIED, DECLINED]))
    text = console.export_text()
    assert "blocks[1]" in text
    assert "k reads the text" in text
    assert "1.50 ms" in text
