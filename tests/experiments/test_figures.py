"""Pictures: names cover nothing, intervals lie where they should, series differ in grey."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from experiments.shared.figures import Panel, Picture, Series, compose, draw, interval, look
from experiments.shared.labels import apart, extent


def names_of(axes):
    return {text.get_text(): text for text in axes.texts}


def boxes_of(axes):
    return {name: extent(text) for name, text in names_of(axes).items()}


def crowd(count, *, line):
    """Series that end, or lie, in nearly one place."""
    return [
        Series(name=f"method number {i}", runs=[[(1.0, 2.0), (2.0, 1 + 1e-3 * i)]], line=line)
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def crowded():
    """Eleven names at one place: right of the axes, and beside points of one height."""
    panels = [
        Panel(x="step", y="nats", series=crowd(11, line=True), rules={"control": 1.0}),
        Panel(x="nats", y="%", series=crowd(8, line=False), names="beside"),
    ]
    return compose(Picture(panels=panels))


@pytest.mark.parametrize("panel", [0, 1])
def test_names_of_what_lies_together_do_not_overlap(crowded, panel):
    boxes = boxes_of(crowded.axes[panel])
    assert len(boxes) == (12, 8)[panel]
    for (a, one), (b, other) in itertools.combinations(boxes.items(), 2):
        assert not one.overlaps(other), (a, b)


def test_names_at_the_right_keep_the_order_of_the_lines_and_the_picture_holds_them(crowded):
    boxes = boxes_of(crowded.axes[0])
    heights = [boxes[f"method number {i}"].y0 for i in range(11)]
    assert heights == sorted(heights)
    assert max(box.x1 for box in boxes.values()) <= crowded.bbox.x1
    assert min(box.x0 for box in boxes.values()) > crowded.axes[0].get_window_extent().x1


def test_names_beside_points_cover_none(crowded):
    axes = crowded.axes[1]
    for line in axes.lines:
        for x, y in axes.transData.transform(line.get_xydata()):
            for name, box in boxes_of(axes).items():
                assert not box.contains(x, y), name


def test_letters_are_as_tall_as_a_page_needs(crowded):
    shown = 600 / crowded.bbox.width  # pixels of a page for one of the picture
    for axes in crowded.axes:
        for text in [*axes.texts, axes.xaxis.label, *axes.get_xticklabels()]:
            assert text.get_fontsize() * crowded.dpi / 72 * shown >= 10


def test_places_are_apart_in_order_and_inside():
    assert apart([0, 0, 0], 10, -50, 50).tolist() == [-10, 0, 10]
    assert apart([0, 0, 0], 10, 0, 100).tolist() == [0, 10, 20]
    assert apart([30, 10], 5, 0, 100).tolist() == [30, 10]
    # Where there is no room they reach beyond both ends alike.
    assert apart([1, 2, 3], 10, 0, 10).tolist() == [-5, 5, 15]


def test_mean_and_interval_are_students():
    # By hand: deviation 1 of three values, t of two degrees of freedom 4.30265, over sqrt(3).
    mean, reach = interval(np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]))
    np.testing.assert_allclose(mean, [2, 5])
    np.testing.assert_allclose(reach, [2.48414, 0], atol=1e-5)
    assert np.isnan(interval(np.array([1.0]))[1])


def test_seeds_are_points_beside_their_mean_and_interval():
    runs = [[(1.0, 1.0)], [(1.0, 2.0)], [(1.0, 3.0)]]
    series = Series(name="ours", runs=runs, line=False)
    axes = compose(Picture(panels=[Panel(x="x", y="y", series=[series])])).axes[0]
    seeds, (mean, _, (bar,)) = axes.lines[:3], axes.containers[0]
    assert [line.get_xydata().tolist() for line in seeds] == [[[1, y]] for y in (1, 2, 3)]
    assert mean.get_xydata().tolist() == [[1, 2]]
    np.testing.assert_allclose(bar.get_segments()[0][:, 1], [2 - 2.48414, 2 + 2.48414], atol=1e-5)


def test_series_differ_without_colour():
    looks = [look(number) for number in range(55)]
    assert len({one["marker"] for one in looks[:11]}) == 11
    assert len({(one["marker"], one["linestyle"]) for one in looks}) == 55


def test_a_name_looks_the_same_in_all_panels():
    one, two = (Series(name=name, runs=[[(0.0, 1.0), (1.0, 2.0)]]) for name in ("one", "two"))
    panels = [Panel(x="x", y="y", series=series) for series in ([one, two], [two])]
    first, second = compose(Picture(panels=panels, columns=2)).axes
    assert second.lines[0].get_marker() == first.lines[1].get_marker()
    assert second.lines[0].get_marker() != first.lines[0].get_marker()


def test_what_nothing_is_known_of_has_no_panel():
    some, none = (Series(name="ours", runs=[points]) for points in ([(0.0, 1.0)], []))
    panels = [Panel(x="x", y="y", series=series) for series in ([none], [], [some])]
    assert len(compose(Picture(panels=panels)).axes) == 1
    assert len(compose(Picture(panels=[Panel(x="x", y="y", series=[], names="beside")])).axes) == 1


def test_what_nothing_is_known_of_has_no_name_beside_what_is_known():
    dated = Series(name="known", runs=[[(0.0, 1.0)]])
    unknown = [Series(name="no run", runs=[]), Series(name="no point", runs=[[], []])]
    axes = compose(Picture(panels=[Panel(x="x", y="y", series=[*unknown, dated])])).axes[0]
    assert list(names_of(axes)) == ["known"]


def test_what_lies_below_is_said_to():
    series = [Series(name="fell", runs=[[(0.0, 90.0), (1.0, 10.0)]])]
    axes = compose(Picture(panels=[Panel(x="x", y="%", series=series, low=80.0)])).axes[0]
    assert axes.get_ylim()[0] == 80
    assert list(names_of(axes)) == ["fell (below)"]


def test_runs_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="runs: expected as many points of ours"):
        Series(name="ours", runs=[[(0.0, 1.0)], [(0.0, 1.0), (1.0, 2.0)]])


def test_a_picture_comes_back_from_json_and_its_file_says_of_what_it_is(tmp_path):
    from PIL import Image

    series = Series(name="ours", runs=[[(i, float(i)) for i in range(40)]] * 2)
    panel = Panel(x="step", y="nats", series=[series, Series(name="none", runs=[[]])], log="y")
    picture = Picture(panels=[panel, dataclasses.replace(panel, marks={"end": 3.0})])
    again = Picture.from_json(json.loads(json.dumps(dataclasses.asdict(picture))))
    assert again.source == picture.source
    with Image.open(draw(tmp_path / "deep" / "one.png", again)) as image:
        assert image.info["Source"] == picture.source
        assert image.width >= 600
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["one.png"]


def test_points_of_one_place_on_a_logarithmic_axis_are_drawn(tmp_path):
    # The mean of three such numbers is another in its last digit.
    points = {"a": (13.868543836805555, 2.5), "b": (13.868543836805555, 1.6)}
    series = [Series(name=name, runs=[[point]] * 3, line=False) for name, point in points.items()]
    panel = Panel(x="MiB", y="%", series=series, log=("x", "y"))
    assert draw(tmp_path / "one.png", Picture(panels=[panel])).exists()
