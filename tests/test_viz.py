"Pictures draw the numbers they are given, keep matplotlib's state, and refuse what they cannot draw."

import subprocess, sys
import numpy as np
import pytest
from matplotlib import rcParams

from nash_lab.lab.viz import (
    Picture,
    archive_tree,
    arms_plot,
    composite_heatmaps,
    discovery_plot,
    drift_plot,
    gain_plot,
    loss_plot,
    matrix_plot,
    routing_heatmaps,
    stream_usage,
)
from nash_lab.model.mhc import Routing


@pytest.fixture(scope="module", params=[(1, 2), (2, 4), (6, 4), (13, 3)], ids=str)
def maps(request):
    layers, n = request.param
    rng = np.random.default_rng(0)
    res = rng.dirichlet(np.ones(n), (layers, 2, 2, 5, n)).astype(np.float32)
    return Routing(*rng.random((2, layers, 2, 2, 5, n)).astype(np.float32), res)


def drawn(picture):
    return [np.asarray(ax.images[0].get_array()) for ax in picture.axes if ax.axison and ax.images]


def test_every_sublayer_is_drawn_in_its_place(maps):
    layers, n = maps.res.shape[0], maps.res.shape[-1]
    titles = {
        ax.get_title(loc="left") or ax.get_title(): ax
        for ax in routing_heatmaps(maps).axes
        if ax.images
    }
    assert len(titles) == 2 * layers
    for k in range(2 * layers):
        image = titles[f"layer {k // 2}, {('attention', 'FFN')[k % 2]}"].images[0]
        np.testing.assert_allclose(
            image.get_array(), maps.res[k // 2, k % 2].mean((0, 1)), atol=1e-6
        )
        assert (
            image.get_clim() == (0, 1)
            and image.get_cmap().name == "viridis"
            and image.get_array().shape == (n, n)
        )


def test_one_token_and_the_product(maps):
    one = drawn(routing_heatmaps(maps, token=4))
    assert any(np.allclose(h, maps.res[-1, 1, 0, 4]) for h in one)
    product = np.eye(maps.res.shape[-1], dtype=np.float32)
    for h in maps.res[:, :, 0, 4].reshape(-1, *product.shape):
        product = h @ product
    np.testing.assert_allclose(drawn(composite_heatmaps(maps, token=4))[-1], product, atol=1e-5)
    assert len(drawn(composite_heatmaps(maps, count=3))) == min(3, 2 * len(maps.res))
    for token in (-1, 5):
        with pytest.raises(ValueError, match=f"{token=} is outside the text of 5 tokens"):
            routing_heatmaps(maps, token)


def test_curves():
    stats = dict(
        row_max=[1, 1],
        row_min=[1, 1],
        col_max=[1.2, 1.5],
        col_min=[0.9, 0.7],
        identity=[0.3, 0.4],
        uniform=[1.4, 1.3],
        usage=[[0.25] * 4, [0.7, 0.1, 0.1, 0.1]],
    )
    rows = [
        dict(step=0, tokens=0, time_s=0.0, val_loss=7.6, routing=stats),
        dict(step=1, tokens=10, time_s=0.5, loss=None),
        dict(step=2, tokens=20, time_s=1.0, loss=3.0, val_loss=3.1, routing=stats),
    ]
    edges = [list(line.get_ydata()) for line in gain_plot(stats).axes[0].lines]
    assert [0.9, 0.7] in edges and [1.2, 1.5] in edges
    assert [list(line.get_ydata()) for line in drift_plot(rows).axes[1].lines] == [
        [1.4, 1.4],
        [1.3, 1.3],
    ]
    assert len(stream_usage(stats).axes[0].patches) == 8
    loss, val = loss_plot({"a run": rows}, x="time_s").axes[0].lines
    assert loss.get_xydata().tolist() == [[1, 3]] and val.get_xydata().tolist() == [
        [0, 7.6],
        [1, 3.1],
    ]
    assert (loss.get_label(), val.get_label()) == ("a run training", "a run validation")
    for picture in (gain_plot(stats), drift_plot(rows), stream_usage(stats), loss_plot(rows)):
        for ax in picture.axes:
            assert ax.get_ylabel() and ax.get_title(loc="left")
        assert picture.axes[-1].get_xlabel()


def test_refusals():
    with pytest.raises(ValueError, match=r"none of 2 lines has 'routing'"):
        drift_plot([{"step": 0}, {"step": 1, "routing": None}])
    with pytest.raises(ValueError, match=r"lack col_min, col_max, row_min, row_max, found none"):
        gain_plot({})
    with pytest.raises(ValueError, match=r"lack usage, found identity"):
        stream_usage({"identity": [1]})
    with pytest.raises(ValueError, match=r"x='hours', expected one of \['tokens', 'time_s'\]"):
        loss_plot([], x="hours")
    with pytest.raises(ValueError, match=r"no line of plain has a loss and 'tokens'"):
        loss_plot({"plain": []})
    with pytest.raises(ValueError, match=r"found \(4,\)"):
        matrix_plot(np.ones(4))
    for draw in (discovery_plot, archive_tree, arms_plot):
        with pytest.raises(ValueError, match="draw"):
            draw([])


def test_same_bytes_and_no_trace_left_in_matplotlib():
    before = dict(rcParams)
    picture = matrix_plot(np.eye(4))
    assert isinstance(picture, Picture) and dict(rcParams) == before
    assert picture.png() == matrix_plot(
        np.eye(4)
    ).png() == picture.png() and picture._repr_png_().startswith(b"\x89PNG")
    assert dict(rcParams) == before


def test_pyplot_is_not_imported():
    code = "import sys, nash_lab.lab.viz; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
