"""Views: whole, cut and mirrored, and the same in every run."""

import jaxtyping
import numpy as np
import pytest
from PIL import Image

from logitjax import data


def picture(height=30, width=40):
    """Colours that say where a pixel was."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 255 // height, columns * 255 // width, rows * 0], -1).astype(np.uint8)


def test_a_plain_view_is_the_scaled_middle():
    views = data.ImageViews(size=10, resize=15)
    (view,) = views(picture(), row=0)
    scaled = Image.fromarray(picture()).resize((20, 15), Image.Resampling.BICUBIC)
    # (15 - 10) / 2 rounds to 2, as in torchvision.
    np.testing.assert_array_equal(view, np.asarray(scaled)[2:12, 5:15])
    (again,) = views(picture(), row=99)
    np.testing.assert_array_equal(view, again)
    assert str(views) == "plain 10 px crop bicubic of 15"


@pytest.mark.parametrize("shape", [(30, 40), (41, 30), (7, 500), (500, 7), (1, 1)])
def test_any_picture_gives_a_view(shape):
    for kind, fit in [("plain", "crop"), ("plain", "pad"), ("random", "crop"), ("random", "pad")]:
        views = data.ImageViews(size=12, resize=13, kind=kind, fit=fit)
        assert views(picture(*shape), row=1).shape == (1, 12, 12, 3)


def test_padding_keeps_the_whole_picture_on_white():
    views = data.ImageViews(size=20, resize=24, fit="pad", interpolation="bilinear")
    (view,) = views(np.zeros((10, 20, 3), np.uint8), row=0)
    assert (view[:4] == 255).all()
    assert (view[16:] == 255).all()
    assert (view[6:14] == 0).all()
    assert str(views) == "plain 20 px pad bilinear whole"


def test_random_views_depend_on_seed_row_and_number_only():
    make = dict(size=16, resize=16, kind="random")
    views = data.ImageViews(count=3, **make)
    crops = views(picture(), row=7)
    np.testing.assert_array_equal(crops, views(picture(), row=7))
    # More views begin with the fewer.
    np.testing.assert_array_equal(data.ImageViews(count=5, **make)(picture(), row=7)[:3], crops)
    assert len({view.tobytes() for view in crops}) == 3
    assert (views(picture(), row=8) != crops).any()
    assert (data.ImageViews(count=3, seed=1, **make)(picture(), row=7) != crops).any()


def test_random_views_keep_the_area_asked_for_and_mirror_half():
    views = data.ImageViews(
        size=32, resize=32, kind="random", count=400, scale=(0.25, 0.5), interpolation="bilinear"
    )
    crops = views(picture(120, 120), row=0).astype(float)
    across = crops[:, 16, :, 1]
    mirrored = across[:, 0] > across[:, -1]
    assert 0.4 < mirrored.mean() < 0.6
    spans = [np.ptp(crops[:, :, 16, 0], axis=1), np.ptp(across, axis=1)]
    # The outermost pixels' middles are half a pixel inside, of 32.
    sides = [span / 255 * 32 / 31 for span in spans]
    area = sides[0] * sides[1]
    assert 0.22 < area.min() < 0.3
    assert 0.45 < area.max() < 0.53
    aspect = np.log(sides[1] / sides[0])
    assert np.abs(aspect).max() < np.log(4 / 3) + 0.1
    assert abs(aspect.mean()) < 0.03


def test_wrong_options_are_named():
    make = dict(size=8, resize=8)
    for name, value in [("fit", "stretch"), ("kind", "twice"), ("interpolation", "nearest")]:
        # The tests' own type checker may be faster.
        with pytest.raises((ValueError, jaxtyping.TypeCheckError), match=name):
            data.ImageViews(**(make | {name: value}))
    for options, message in [
        (dict(count=2), "1 for plain views, got 2"),
        (dict(kind="random", count=0), "count: expected at least 1"),
        (dict(scale=(0.9, 0.5)), "scale: expected two ascending shares"),
    ]:
        with pytest.raises(ValueError, match=message):
            data.ImageViews(**(make | options))
