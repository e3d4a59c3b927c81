import re
from pathlib import Path

import pytest

from ditopt.config import Options, env_table, env_variables
from ditopt.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_defaults_mean_lossless_work_only():
    options = Options.parse({}, environ={})
    assert options.load_plan() is None
    assert options.fuse_projections
    assert not options.strict


def test_unknown_option_names_the_closest():
    with pytest.raises(ConfigError, match=r"unknown ditopt option 'pan'.*Did you mean 'plan'"):
        Options.parse({"pan": "plan.yaml"}, environ={})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strict": "perhaps"}, "option 'strict': .*boolean.*got 'perhaps'"),
        ({"fuel": -1}, "option 'fuel': expected a number of rewrites, 0 or more, got -1"),
        ({"inductor": 3}, "option 'inductor': .*dictionary.*got 3"),
        ({"disable": 3}, "option 'disable': .*tuple.*got 3"),
    ],
)
def test_bad_value_names_the_option_and_the_value(options, message):
    with pytest.raises(ConfigError, match=message):
        Options.parse(options, environ={})


def test_options_that_are_no_mapping_are_refused():
    with pytest.raises(ConfigError, match="options must map names to values, got str"):
        Options.parse("plan.yaml", environ={})


def test_environment_fills_what_the_options_leave_out():
    environ = {"DITOPT_DISABLE": "fuse_heads, cache", "DITOPT_FUEL": "3", "DITOPT_STRICT": "1"}
    options = Options.parse({"fuel": 7}, environ)
    assert options.disable == ("fuse_heads", "cache")
    assert options.strict
    assert options.fuel == 7


def test_bad_and_unknown_variables_are_named():
    with pytest.raises(ConfigError, match=r"DITOPT_FUEL: .*integer.*got 'many'"):
        Options.parse({}, {"DITOPT_FUEL": "many"})
    with pytest.raises(ConfigError, match=r"DITOPT_DUMPS.*Did you mean 'DITOPT_DUMP'"):
        Options.parse({}, {"DITOPT_DUMPS": "folder"})


def test_an_empty_variable_counts_as_unset():
    assert Options.parse({}, {"DITOPT_DUMP": ""}).dump is None


def test_the_page_of_variables_is_up_to_date():
    page = (ROOT / "docs" / "env_vars.md").read_text(encoding="utf-8")
    assert page == env_table(), "run: python -m ditopt.config > docs/env_vars.md"


def test_every_variable_in_the_code_is_declared():
    named = set()
    for path in (ROOT / "ditopt").rglob("*.py"):
        named |= set(re.findall(r"\bDITOPT_[A-Z_]*[A-Z]\b", path.read_text(encoding="utf-8")))
    assert named <= set(env_variables().values())


def test_the_settings_stay_few():
    assert len(Options.model_fields) < 15
