"""A part of the matrix of `tests/matrix.py`, in which every family teaches and learns three times."""

import pytest

from tests.families import FAMILIES, STUDENTS
from tests.matrix import make_data, train_pair

PAIRS = [
    (teacher, STUDENTS[(number + 5 * shift) % len(STUDENTS)])
    for number, teacher in enumerate(FAMILIES)
    for shift in range(3)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_a_pair_trains(teacher, student, data, tmp_path):
    train_pair(teacher, student, data, tmp_path)


def test_every_family_takes_part():
    assert {teacher for teacher, _ in PAIRS} == set(FAMILIES) and {student for _, student in PAIRS} == set(STUDENTS)
