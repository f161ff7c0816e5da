"""What the configurations of all methods have in common."""

from dataclasses import fields

import pytest

from asd_hf.errors import UserError
from asd_hf.methods import METHODS, get_method

KINDS = {name: get_method(name).config_class for name in METHODS}


def counted(config_class):
    """Weights, costs of the matching and steps of a ramp: numbers that have no meaning below 0."""
    names = [field.name for field in fields(config_class) if "str" not in str(field.type)]
    return [n for n in names if n.endswith(("weight", "_cost")) or n.startswith("ramp_")]


@pytest.mark.parametrize(("name", "knob"), [(name, knob) for name in METHODS for knob in counted(KINDS[name])])
@pytest.mark.parametrize("value", [-1, float("inf"), float("nan")])
def test_what_has_no_meaning_below_0_is_refused(name, knob, value):
    with pytest.raises(UserError, match=f"^method.{knob} must be 0 or above, not {value}$"):
        KINDS[name](**{knob: value})


def test_costs_and_ramps_are_among_them():
    assert {"class_cost", "bbox_cost", "giou_cost"} < set(counted(KINDS["detrdistill"]))
    assert "ramp_steps" in counted(KINDS["od_detr"]) and "ramp_start" in counted(KINDS["asd"])


# Factors of several terms, and a weight of what trains a sampler that is not there by default.
FACTORS = {"balanced_pairs": {"pair_weight", "asked_weight", "sampling_weight"}}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_without_any_weight_is_refused(name):
    """The whole method may have the weight 0: it is measured then, and trains nothing."""
    knobs = [k for k in counted(KINDS[name]) if k.endswith("_weight") and k not in FACTORS.get(name, ())]
    off = dict.fromkeys(knobs, 0)
    with pytest.raises(UserError, match=f"^all weights of {name} are 0: give one a value, or set method.name=none$"):
        KINDS[name](**off)
    for knob in knobs:
        assert KINDS[name](**off | {knob: 0.5}).term_weight(knob.removesuffix("_weight")) == 0.5
    KINDS[name](weight=0)
