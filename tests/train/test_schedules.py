"""Schedules: factors between 0 and 1 that follow from the step alone."""

import numpy as np
import pytest

from onnxcompress.errors import InputError
from onnxcompress.train.schedules import (
    SCHEDULES,
    constant,
    cosine,
    linear,
    one_cycle,
    stepped,
    warm_up,
)


def course(schedule, total=100):
    return np.array([schedule(done, total) for done in range(total)])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 7, 1000])
def test_a_factor_lies_between_nothing_and_one(name, total):
    found = course(SCHEDULES[name], total)
    assert (found > 0).all() and (found <= 1).all()


def test_courses():
    assert (course(constant) == 1).all()
    np.testing.assert_allclose(course(linear), 1 - np.arange(100) / 100)
    np.testing.assert_allclose(course(cosine), (1 + np.cos(np.pi * np.arange(100) / 100)) / 2)
    np.testing.assert_allclose(course(stepped(times=3, factor=0.5)),
                               np.repeat([1, 0.5, 0.25, 0.125], 25))  # fmt: skip


def test_warm_up_rises_and_then_goes_on_as_told():
    found = course(warm_up(0.1, linear))
    np.testing.assert_allclose(found[:10], np.arange(1, 11) / 11)
    np.testing.assert_allclose(found[10:], 1 - np.arange(90) / 90)
    np.testing.assert_allclose(course(warm_up(0.0, cosine)), course(cosine))


def test_one_cycle_has_one_peak():
    found = course(one_cycle(peak=0.3, start=0.1))
    assert found[0] == pytest.approx(0.1)
    assert found.argmax() == 30 and found[30] == 1
    assert (np.diff(found[:31]) > 0).all() and (np.diff(found[30:]) < 0).all()


@pytest.mark.parametrize(
    "make", [lambda: warm_up(1.0), lambda: stepped(0), lambda: stepped(2, 1.5),
             lambda: one_cycle(0.0), lambda: one_cycle(start=2)],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(make):
    with pytest.raises(InputError):
        make()
