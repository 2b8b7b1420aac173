"""Lines through points, and the drawing of both."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from benchmarks.line_plot import Labels, draw_plot, fit_line


def test_points_on_a_line_leave_no_residual() -> None:
    line = fit_line([(1, 3), (2, 5), (4, 9)])

    assert (line.intercept, line.slope) == pytest.approx((1, 2))
    assert line.residual == pytest.approx(0, abs=1e-9)
    assert line.r_squared == pytest.approx(1)


def test_residual_is_the_root_mean_square_distance() -> None:
    line = fit_line([(0, 1), (0, -1), (1, 1), (1, -1)])

    assert line.residual == pytest.approx(1)
    assert line.r_squared == pytest.approx(0)


def test_every_point_is_drawn_inside_the_picture() -> None:
    points = [(1.0, 0.1), (2.0, 0.4), (256.0, 2.0)]

    root = ET.fromstring(draw_plot(points, fit_line(points), Labels("t", "x", "y")))

    circles = [element for element in root if element.tag.endswith("circle")]
    assert len(circles) == len(points)
    assert all(0 < float(circle.attrib["cx"]) < 640 for circle in circles)
    assert all(0 < float(circle.attrib["cy"]) < 400 for circle in circles)
