"""Every family and method trains as it did when `tests/golden/curves.json` was written."""

import json

import pytest

from tests.reference_curves import CASES, FILE, configuration, curves, differences, write_places

RENEW = "if the change is meant, renew the curves: python -m tests.reference_curves --renew"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return write_places(tmp_path_factory.mktemp("curves"))


@pytest.mark.parametrize("case", CASES)
def test_the_loss_goes_as_it_went(case, places):
    found = list(differences(curves(configuration(places, case)), json.loads(FILE.read_text())[case]))
    assert not found, "\n".join([*found, RENEW])


def test_the_file_has_no_other_curves():
    assert list(json.loads(FILE.read_text())) == CASES


@pytest.mark.parametrize(
    ("section", "key", "value", "first"),
    [
        ("method", "weight", 1.02, "loss/fitnet"),
        ("training", "data_seed", 1, "grad_norm at step 1"),  # another order
        ("training", "learning_rate", 3.3e-4, "loss/loss_ce at step 2"),
    ],
)
def test_a_small_change_shows(section, key, value, first, places):
    sections = configuration(places, "method fitnet")
    sections[section][key] = value
    found = list(differences(curves(sections), json.loads(FILE.read_text())["method fitnet"]))
    assert any(line.startswith(first) for line in found)
