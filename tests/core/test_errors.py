import warnings

import pytest

from ditopt import errors


def test_remedy_follows_the_message_in_one_line():
    error = errors.PlanError("the plan\nis for another model.", remedy="Make a new one.")
    assert str(error) == "the plan is for another model. Make a new one."


def test_without_remedy_the_message_stands_alone():
    assert str(errors.ProfileError("0 seeds")) == "0 seeds"


def test_close_names_are_suggested_else_all_are_listed():
    assert errors.did_you_mean("blocks.1.atn", ["blocks.1.attn", "head"]) == (
        "Did you mean 'blocks.1.attn'?"
    )
    assert errors.did_you_mean("zzz", ["b", "a"]) == "Known names: a, b."
    assert errors.did_you_mean("zzz", []) == "There are none."


def test_warnings_of_ditopt_are_errors_in_this_suite():
    with pytest.raises(errors.DitoptWarning, match="slower"):
        warnings.warn("slower than asked", errors.DitoptWarning, stacklevel=1)
