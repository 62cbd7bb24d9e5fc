"""Pictures show what they were given: lines, bars, patches, units; and the same data gives the same file."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from kvcompress import CacheReport
from kvcompress.errors import ConfigError, MissingDependencyError
from kvcompress.evaluation import plots
from kvcompress.evaluation.image_grid import PatchGrid, square_grid
from kvcompress.evaluation.plots.rows import metric_names, read_series, read_value
from kvcompress.evaluation.plots.style import look

IMPORTANCE = [[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 5.0], [4.0, 1.0, 2.0, 3.0]]
ROWS: list[dict[str, Any]] = [
    {
        "policy": policy,
        "budget": budget,
        "perplexity": 3.0 - budget + shift,
        "perplexity_ci_low": 2.9 - budget + shift,
        "perplexity_ci_high": 3.2 - budget + shift,
        "seconds_to_first_token": 0.5,
        "tokens_per_second": 10.0 / budget,
    }
    for policy, shift in (("prefixkv", 0.0), ("uniform", 0.4))
    for budget in (0.2, 0.5, 0.8)
] + [{"policy": "full", "budget": 1.0, "perplexity": 1.9, "seconds_to_first_token": 0.4, "tokens_per_second": 9.0}]


def labels(figure: Figure) -> list[str]:
    """Every word around the data: axis labels, titles, legends, captions."""
    found = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    found += [text.get_text() for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()]
    for axes in figure.axes:
        found += [axes.get_xlabel(), axes.get_ylabel(), axes.get_title()]
    return found + [text.get_text() for text in (figure._supxlabel, figure._supylabel) if text is not None]


def drawn_lines(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def plain_gini(values: list[float]) -> float:
    """Half the mean absolute difference of all pairs, over the mean."""
    differences = sum(abs(a - b) for a in values for b in values)
    return differences / (2 * len(values) * sum(values))


# -- Lorenz ------------------------------------------------------------------------------------------------------------


def test_a_lorenz_curve_is_the_running_share_of_the_sorted_importance() -> None:
    curves, bars = plots.lorenz(IMPORTANCE).axes
    lines = curves.lines[1:]  # the first is equality
    assert len(lines) == len(IMPORTANCE)
    for line, layer in zip(lines, IMPORTANCE, strict=True):
        running = [0.0, *np.cumsum(sorted(layer)) / sum(layer) * 100]
        np.testing.assert_allclose(line.get_xdata(), [0, 25, 50, 75, 100])
        np.testing.assert_allclose(line.get_ydata(), running)
    heights = [patch.get_height() for patch in bars.patches]
    np.testing.assert_allclose(heights, [plain_gini(layer) for layer in IMPORTANCE], atol=1e-12)


def test_the_lorenz_legend_names_the_extremes_with_their_gini_coefficient() -> None:
    told = labels(plots.lorenz(IMPORTANCE))
    assert "layer 0, most even: Gini 0.00" in told and "layer 1, least even: Gini 0.75" in told
    assert "tokens, least important first (%)" in told and "share of importance (%)" in told


def test_a_long_prompt_makes_no_large_file(tmp_path: Path) -> None:
    importance = np.random.default_rng(0).random((8, 20_000)).tolist()
    _, drawn = plots.save(plots.lorenz(importance), tmp_path / "lorenz")
    assert drawn.stat().st_size < 150_000


@pytest.mark.parametrize("importance", [[], [[]], [[1.0], []], [[1.0, -1.0]]])
def test_importance_that_is_no_mass_is_refused(importance: list[list[float]]) -> None:
    with pytest.raises(ConfigError, match="importance: must be"):
        plots.lorenz(importance)


# -- retention ---------------------------------------------------------------------------------------------------------


def test_few_budgets_stand_side_by_side_and_each_bar_is_a_layers_retention() -> None:
    layers = {0.5: [0.6, 0.5, 0.4], 0.2: [0.1, 0.2, 0.3]}
    figure = plots.retention(layers)
    (axes,) = figure.axes
    assert [[patch.get_height() for patch in bars] for bars in axes.containers] == [
        pytest.approx([10, 20, 30]),
        pytest.approx([60, 50, 40]),
    ]
    assert len({bars[0].get_hatch() for bars in axes.containers}) == 2
    told = labels(figure)
    assert {"budget 20 %", "budget 50 %", "mean over layers", "layer", "retention: kept / seen (%)"} <= set(told)
    left, right = (bars[0].get_x() + bars[0].get_width() for bars in axes.containers)
    assert right - left == pytest.approx(axes.containers[0][0].get_width())  # neighbours touch, none covers another


def test_many_budgets_have_a_panel_each_on_the_same_scale() -> None:
    layers = {number / 10: [number / 10] * 4 for number in range(1, 10)}
    figure = plots.retention(layers, {budget: [0.01] * 4 for budget in layers})
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == [f"budget {number}0 %" for number in range(1, 10)]
    assert len({axes.get_ylim() for axes in shown}) == 1 and shown[0].get_ylim()[1] >= 90
    assert all(len(axes.patches) == 4 and axes.collections for axes in shown)  # bars and whiskers


def test_budgets_with_different_numbers_of_layers_are_refused() -> None:
    for wrong in ({}, {0.2: []}, {0.2: [0.2], 0.5: [0.5, 0.5]}):
        with pytest.raises(ConfigError, match="layers: must give as many layers"):
            plots.retention(wrong)


def test_a_profile_is_drawn_from_an_object_or_a_mapping() -> None:
    class Profile:
        budgets = (0.2, 0.5)
        retention = ((0.1, 0.3), (0.4, 0.6))
        spread = ((0.01, 0.02), (0.03, 0.04))

    for profile in (Profile(), {"retention": {0.2: [0.1, 0.3], 0.5: [0.4, 0.6]}, "spread": None}):
        (axes,) = plots.plot_profile(profile).axes
        heights = [patch.get_height() for patch in axes.patches]
        assert heights == pytest.approx([10, 30, 40, 60])
    with pytest.raises(ConfigError, match="has no 'retention'"):
        plots.plot_profile({})


# -- results -----------------------------------------------------------------------------------------------------------


def test_a_policy_is_a_line_over_budgets_with_a_band_and_the_full_cache_a_level_line() -> None:
    figure = plots.quality(ROWS, "perplexity")
    (axes,) = figure.axes
    lines = drawn_lines(axes)
    assert list(lines) == ["full", "prefixkv", "uniform"]
    np.testing.assert_allclose(lines["uniform"].get_xdata(), [20, 50, 80])
    np.testing.assert_allclose(lines["uniform"].get_ydata(), [3.2, 2.9, 2.6])
    assert set(lines["full"].get_ydata()) == {1.9}
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(2.1) and band[:, 1].max() == pytest.approx(3.0)
    told = labels(figure)
    assert "perplexity of the answer (lower is better)" in told and "budget (% of the tokens)" in told
    assert {"full", "prefixkv", "uniform"} <= set(told)


@pytest.mark.parametrize(
    ("unit", "budgets", "held", "places", "label"),
    [
        ("fraction", (0.2, 0.5), {"retention": (0.76, 0.77)}, [76, 77], "held (% of the tokens)"),
        ("tokens", (20, 50), {"held_tokens": (76.5, 80.0)}, [76.5, 80], "held (tokens per layer)"),
        ("bytes", (2**20, 2**21), {"kv_bytes": (3.0 * 2**20, 2.5 * 2**20)}, [2.5, 3], "held (MiB)"),
    ],
)
def test_points_stand_at_what_was_held_where_rows_tell(
    unit: str, budgets: tuple[float, float], held: dict[str, tuple[float, float]], places: list[float], label: str
) -> None:
    ((name, amounts),) = held.items()
    rows = [
        {"policy": "a", "budget": budget, "budget_unit": unit, name: amount, "perplexity": 2.0}
        for budget, amount in zip(budgets, amounts, strict=True)
    ]
    full = {"policy": "full", "budget": 1.0, "budget_unit": "fraction", "perplexity": 1.0}
    (axes,) = plots.quality([full, *rows], "perplexity").axes
    np.testing.assert_allclose(drawn_lines(axes)["a"].get_xdata(), places)
    assert axes.get_xlabel() == label
    low, high = axes.get_xlim()
    assert low < min(places) and max(places) < high
    older = [*rows, {**rows[0], "policy": "b", name: None}]  # one that does not tell: all stand at their budgets
    (axes,) = plots.quality(older, "perplexity").axes
    assert axes.get_xlabel().startswith("budget (") and set(drawn_lines(axes)) == {"a", "b"}


def test_at_a_single_budget_policies_stand_side_by_side_with_whiskers() -> None:
    (axes,) = plots.quality([row for row in ROWS if row["budget"] in (0.5, 1.0)], "perplexity").axes
    lines = drawn_lines(axes)
    left, right = lines["prefixkv"].get_xdata()[0], lines["uniform"].get_xdata()[0]
    assert left < 50 < right and (left + right) / 2 == 50 and axes.get_xticks().tolist() == [50]
    assert len(axes.containers) == 2  # a whisker each


def test_perplexities_far_apart_are_drawn_on_a_logarithmic_axis() -> None:
    far = [*ROWS, {"policy": "streaming", "budget": 0.2, "perplexity": 60.0}]
    assert plots.quality(ROWS, "perplexity").axes[0].get_yscale() == "linear"
    assert plots.quality(far, "perplexity").axes[0].get_yscale() == "log"


@pytest.mark.parametrize("first", [1.0, 30.0], ids=["low", "high"])  # where the grey lines begin, among others
@pytest.mark.parametrize("log", [False, True])
def test_of_many_lines_some_are_shown_and_the_others_grey_with_their_names(log: bool, first: float) -> None:
    many = [
        {"policy": f"p{number}", "budget": budget, "perplexity": first + number / 20, "perplexity_ci_low": 1.0}
        for number in range(12)
        for budget in (0.2, 0.5)
    ]
    figure = plots.quality([*ROWS, *many], "perplexity", shown=["prefixkv", "p3"], log=log)
    (axes,) = figure.axes
    assert axes.get_yscale() == ("log" if log else "linear")
    assert [text.get_text() for legend in figure.legends for text in legend.texts] == ["full", "prefixkv", "p3"]
    named = {text.get_text() for text in axes.texts}
    assert named == {"uniform", *(f"p{number}" for number in range(12) if number != 3)}
    assert len([band for band in axes.collections if len(band.get_paths())]) == 2
    figure.draw_without_rendering()
    boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda box: box.y0)  # without its arrow
    assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))
    frame = axes.get_window_extent()
    assert frame.y0 - 1 <= boxes[0].y0 and boxes[-1].y1 <= frame.y1 + 1  # none runs into what stands above
    with pytest.raises(ConfigError, match=r"shown: must be policies of the rows; got p99"):
        plots.quality(many, "perplexity", shown=["p99"])


def test_a_metric_that_no_row_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="no row has 'rouge9'"):
        plots.quality(ROWS, "rouge9")


@pytest.mark.parametrize(
    "row",
    [
        {"accuracy": 0.5, "accuracy_ci_low": 0.4, "accuracy_ci_high": 0.7},
        {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.7},
        {"accuracy": {"value": 0.5, "ci_low": 0.4, "ci_high": 0.7}},
        {"metrics": {"accuracy": {"value": 0.5, "ci_low": 0.4, "ci_high": 0.7}}},
        {"metrics": {"accuracy": 0.5, "accuracy_ci_low": 0.4, "accuracy_ci_high": 0.7}},
        {"accuracy": 0.5, "ci": {"accuracy": [0.4, 0.7]}},
    ],
)
def test_a_value_is_read_however_a_row_spells_its_interval(row: dict[str, Any]) -> None:
    assert read_value(row, "accuracy") == (0.5, 0.4, 0.7)
    assert read_value(row, "perplexity") is None
    if not {"accuracy_low", "ci"} & set(row):
        assert metric_names([row]) == ["accuracy"]


def test_the_last_row_of_a_cell_counts_and_a_missing_interval_is_the_value() -> None:
    rows = [{"policy": "a", "budget": 0.2, "x": 1.0}, {"policy": "a", "budget": 0.2, "x": 2.0}]
    ((series),) = read_series(rows, "x")
    (point,) = series.points
    assert (point.value, point.low, point.high) == (2.0, 2.0, 2.0) and not series.reference


def test_latency_and_throughput_have_a_panel_each_with_units() -> None:
    figure = plots.speed(ROWS)
    first, per_token, throughput = figure.axes
    assert first.get_ylabel() == "time to first token (s)" and throughput.get_ylabel() == "throughput (tokens/s)"
    assert per_token.get_ylabel() == "time per token (ms)"
    np.testing.assert_allclose(drawn_lines(per_token)["prefixkv"].get_ydata(), [20, 50, 80])  # 1000 / tokens per second
    assert all(axes.get_ylim()[0] == 0 and axes.get_xlabel() == "budget (% of the tokens)" for axes in figure.axes)
    by_length = plots.speed([{**row, "prompt_tokens": 100} for row in ROWS], x="prompt_tokens")
    assert "prompt (tokens)" in labels(by_length)
    with pytest.raises(ConfigError, match="rows: none has any of seconds_to_first_token"):
        plots.speed([{"policy": "a", "budget": 0.2}])


def test_all_pictures_of_some_results_come_in_one_call(tmp_path: Path) -> None:
    figures = plots.plot_results(ROWS)
    assert list(figures) == ["perplexity", "speed"]
    both = [{**row, "model": "shapes", "data": data} for row in ROWS for data in ("shapes", "my/data.json")]
    assert list(plots.plot_results(both)) == [
        "perplexity-shapes-shapes",
        "speed-shapes-shapes",
        "perplexity-shapes-my-data.json",
        "speed-shapes-my-data.json",
    ]
    assert [path.name for path in plots.save_all(figures, tmp_path / "new")] == [
        "perplexity.png",
        "perplexity.svg",
        "speed.png",
        "speed.svg",
    ]
    with pytest.raises(ConfigError, match="nothing could be drawn"):
        plots.plot_results([{"policy": "a", "budget": 0.2}])


def test_budgets_in_several_units_have_pictures_of_their_own() -> None:
    full = ROWS[-1]
    tokens = [{**row, "budget": 512, "budget_unit": "tokens"} for row in ROWS[:1]]
    bytes_ = [{**row, "budget": 3 * 2**20, "budget_unit": "bytes"} for row in ROWS[:1]]
    figures = plots.plot_results([*ROWS, *tokens, *bytes_])
    assert [name for name in figures if name.startswith("speed")] == ["speed-fraction", "speed-tokens", "speed-bytes"]
    for unit, label, tick in (("tokens", "budget (tokens per layer)", 512), ("bytes", "budget (MiB)", 3)):
        (axes,) = figures[f"perplexity-{unit}"].axes
        assert axes.get_xlabel() == label and axes.get_xticks().tolist() == [tick]
        assert list(drawn_lines(axes)) == ["full", "prefixkv"]
    with pytest.raises(ConfigError, match="budgets must be of one unit; got bytes, tokens"):
        plots.quality([full, *tokens, {**bytes_[0], "policy": "other"}], "perplexity")


def test_lines_differ_by_more_than_their_colour() -> None:
    looks = [tuple(look(index).values()) for index in range(16)]
    assert len(set(looks)) == 16
    assert all(looks[a][1:] != looks[b][1:] for a in range(16) for b in range(a))  # in grey as well


# -- patches -----------------------------------------------------------------------------------------------------------


def report_of(*layers: list[list[int]]) -> CacheReport:
    """A report of one row whose layers hold these columns, a list for each set of heads."""
    return CacheReport(
        tokens_seen=20,
        row_tokens_seen=[20],
        layer_tokens=[[20] for _ in layers],
        image_tokens=[[0] for _ in layers],
        layer_lengths=[[len(sets[0])] for sets in layers],
        layer_budgets=None,
        held_positions=[[sets] for sets in layers],
        kv_bytes=0,
        index_bytes=0,
        full_kv_bytes=0,
    )


def faded(axes: Any) -> np.ndarray:
    """How opaque the grey veil over each patch is."""
    return np.asarray(axes.images[1].get_array())[..., 3]


def test_the_patches_in_full_colour_are_the_columns_that_the_report_holds() -> None:
    grid = square_grid(range(3, 12))  # nine image tokens after three of text
    report = report_of([[0, 3, 7, 11, 15]], [[3, 4, 5]])
    first, second = plots.patches(report, grid).axes
    assert np.argwhere(faded(first) == 0).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert np.argwhere(faded(second) == 0).tolist() == [[0, 0], [0, 1], [0, 2]]
    assert first.get_title() == "layer 0: 3 of 9" and second.get_title() == "layer 1: 3 of 9"
    assert first.get_xlim() == (0, 3) and first.get_ylim() == (3, 0)  # row 0 on top


def test_the_outline_runs_around_what_is_kept() -> None:
    (axes,) = plots.patches(report_of([[0, 1]]), square_grid(range(4))).axes
    edges = {tuple(map(tuple, np.asarray(edge).tolist())) for edge in axes.collections[0].get_segments()}
    assert edges == {
        ((0, 0), (1, 0)),
        ((1, 0), (2, 0)),
        ((0, 1), (1, 1)),
        ((1, 1), (2, 1)),
        ((0, 0), (0, 1)),
        ((2, 0), (2, 1)),
    }


def test_a_patch_fades_the_more_the_fewer_heads_keep_it() -> None:
    grid = PatchGrid((5, 6), ((0, 1), (0, 0)), (1, 2))  # cells in any order
    figure = plots.patches(report_of([[5, 6], [5], [5], [5]]), grid)
    left, right = faded(figure.axes[0])[0]
    assert right == 0 and left == pytest.approx(0.78 * 0.75)
    assert any("heads" in text for text in labels(figure))
    np.testing.assert_allclose(plots.kept_share(report_of([[5, 6], [5]]), grid, 0), [[0.5, 1.0]])


def test_a_white_shape_shows_where_its_patches_are_evicted() -> None:
    grid = square_grid(range(4))
    picture = np.array([[[255] * 3, [0] * 3], [[120] * 3, [255] * 3]], dtype=np.uint8)
    (axes,) = plots.patches(report_of([[9]]), grid, picture).axes
    veil = axes.images[1].get_array()
    seen = veil[..., 3:] * veil[..., :3] + (1 - veil[..., 3:]) * picture / 255
    white, black, grey = seen[0, 0, 0], seen[0, 1, 0], seen[1, 0, 0]
    assert white - grey > 0.1 and grey - black > 0.05 and white < 0.9


def test_a_picture_lies_below_in_its_own_colours(tmp_path: Path) -> None:
    picture = Image.new("RGB", (6, 6), (200, 30, 30))
    figure = plots.patches(report_of([[0]]), square_grid(range(4)), picture)
    assert figure.axes[0].images[0].get_array()[0, 0].tolist() == [200, 30, 30]
    assert figure.axes[0].images[0].get_extent() == [0, 2, 2, 0]


def test_some_layers_can_be_chosen() -> None:
    report = report_of(*[[[layer]] for layer in range(9)])
    titles = [axes.get_title() for axes in plots.patches(report, square_grid(range(9)), layers=[0, 8]).axes]
    assert titles == ["layer 0: 1 of 9", "layer 8: 1 of 9"]
    with pytest.raises(ConfigError, match="layers: must be some of 0 to 8"):
        plots.patches(report, square_grid(range(9)), layers=[9])


@pytest.mark.parametrize("count", [0, 3, 8])
def test_image_tokens_that_fill_no_square_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"{count} image tokens fill no square grid"):
        square_grid(range(count))


def test_cells_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="one for each image token"):
        PatchGrid((1, 2), ((0, 0),), (1, 2))
    with pytest.raises(ConfigError, match=r"\(0, 2\) lies outside the grid of 1 x 2"):
        PatchGrid((1,), ((0, 2),), (1, 2))


# -- files and style ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["picture", "picture.png", "picture.svg"])
def test_a_picture_is_written_as_png_and_svg(tmp_path: Path, name: str) -> None:
    image, drawn = plots.save(plots.lorenz(IMPORTANCE), tmp_path / "new" / name)
    assert (image.name, drawn.name) == ("picture.png", "picture.svg")
    with Image.open(image) as opened:
        assert opened.size == (1400, 600)
    assert drawn.read_text().rstrip().endswith("</svg>")


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    for draw in (
        lambda: plots.lorenz(IMPORTANCE),
        lambda: plots.quality(ROWS, "perplexity"),
        lambda: plots.patches(report_of([[0]]), square_grid(range(4))),
    ):
        first, second = (plots.save(draw(), tmp_path / name) for name in ("first", "second"))
        for a, b in zip(first, second, strict=True):
            assert a.read_bytes() == b.read_bytes()
        assert "dc:date" not in first[1].read_text()


def test_a_readers_own_style_neither_changes_nor_shows(tmp_path: Path) -> None:
    plain = plots.save(plots.lorenz(IMPORTANCE), tmp_path / "plain")[1].read_bytes()
    with matplotlib.rc_context({"lines.linewidth": 9.0, "font.size": 30.0, "svg.hashsalt": "mine"}):
        mine = plots.save(plots.lorenz(IMPORTANCE), tmp_path / "mine")[1].read_bytes()
        assert matplotlib.rcParams["font.size"] == 30.0 and matplotlib.rcParams["svg.hashsalt"] == "mine"
    assert mine == plain


def test_nothing_is_drawn_by_pyplot() -> None:
    folder = Path(plots.__file__).parent
    assert not [path.name for path in folder.glob("*.py") if "matplotlib.pyplot" in path.read_text()]


def test_a_place_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        plots.save(plots.lorenz(IMPORTANCE), tmp_path / "file" / "picture")


def test_without_matplotlib_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'kvcompress\[evaluation\]'"):
        plots.lorenz(IMPORTANCE)
