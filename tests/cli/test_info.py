"""`posmlp info` at another image size: what a choice of windows costs."""

from __future__ import annotations

import re

import pytest

from posmlp.info import describe
from posmlp.window_choices import describe_choices, window_choices


def test_the_choices_at_384_reach_the_paper_s_figure():
    """12 12 24 12 is the choice that takes 17.7 G, without the position maps."""
    text = describe("posmlp_tiny", size=384)
    assert re.search(r"12 12 24 12 +18\.65 G +17\.67 G", text)
    assert re.search(r"model's own +14 14 14 7 +14\.60 G", text)
    assert "17.7 G" in text and "17.7 G" not in describe("posmlp_small", size=384)


def test_choices_are_shown_only_where_there_is_a_question():
    assert "choice" not in describe("posmlp_nano")
    assert "choice" not in describe("posmlp_nano", size=32)
    assert re.search(r"as asked +6 6 ", describe("posmlp_nano", windows=[6]))
    assert "as asked" not in describe("posmlp_nano", windows=[8, 4])


@pytest.mark.parametrize(
    ("own", "maps", "scale", "expected"),
    [
        # 384 for windows of 224
        (
            [14, 14, 14, 7],
            [96, 48, 24, 12],
            384 / 224,
            [(14, 14, 14, 7), (12, 12, 12, 6), (12, 12, 12, 12), (12, 12, 24, 12), (24, 24, 24, 12)],
        ),
        # the size of the windows: all choices are one
        ([8, 4], [8, 4], 1.0, [(8, 4)]),
        # a map of a prime side, a map of one token, a model of one level
        ([7], [13], 0.1, [(7,), (1,), (13,)]),
        ([7], [1], 0.01, [(7,), (1,)]),
    ],
)
def test_window_choices(own, maps, scale, expected):
    def square(sides):
        return [(side, side) for side in sides]

    choices = window_choices(square(own), square(maps), scale)
    assert [tuple(window[0] for window in windows) for windows in choices.values()] == expected
    assert next(iter(choices)) == "the model's own"


def test_windows_that_are_no_squares_are_shown_by_their_sides():
    assert re.search(r"as asked +4x8 4 ", describe_choices("posmlp_nano", 64, [(4, 8), (4, 4)]))
