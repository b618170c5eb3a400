"""The pictures of the evaluation: what they say, that it can be read, and that it is the same from run to run."""

import functools
import itertools
import warnings

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from catdog import evaluation_plots, plots
from catdog.evaluation import LabelledPredictions
from catdog.evaluation_tables import evaluation_tables
from catdog.plots import decimals, fit_picture, percent, plain_text, plot_learning_curves

BREEDS = [
    "abyssinian",
    "american_bulldog",
    "american_pit_bull_terrier",
    "basset_hound",
    "beagle",
    "bengal",
    "birman",
    "bombay",
    "boxer",
    "british_shorthair",
    "chihuahua",
    "egyptian_mau",
    "english_cocker_spaniel",
    "english_setter",
    "german_shorthaired",
    "great_pyrenees",
    "havanese",
    "japanese_chin",
    "keeshond",
    "leonberger",
    "maine_coon",
    "miniature_pinscher",
    "newfoundland",
    "persian",
    "pomeranian",
    "pug",
    "ragdoll",
    "russian_blue",
    "saint_bernard",
    "samoyed",
    "scottish_terrier",
    "shiba_inu",
    "siamese",
    "sphynx",
    "staffordshire_bull_terrier",
    "wheaten_terrier",
    "yorkshire_terrier",
]
DOLLARS = ["$x_1$ dear", "_hidden"]
EVERY_SIZE = pytest.mark.parametrize(("classes", "images"), [(2, 2400), (2, 6), (3, 600), (37, 2400)])


@functools.cache
def made(classes, images=2400, skill=6.0, names=None):
    """Predictions of a made-up model and the tables of the evaluation; higher skill means fewer mistakes."""
    names = names or (("cat", "dog") if classes == 2 else tuple(BREEDS[:classes]))
    rng = np.random.default_rng(classes)
    labels = np.arange(images) % classes
    logits = rng.normal(0, 1.6, (images, classes))
    logits[np.arange(images), labels] += skill * (1 - 0.3 * (labels % 5 == 2))
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    paths = tuple(f"{number:05d}.jpg" for number in range(images))
    predictions = LabelledPredictions(paths, labels, shares.astype(np.float32), names, 0.5)
    manifest = pd.DataFrame(
        {
            "path": paths,
            "label": np.asarray(names)[labels],
            "width": rng.integers(200, 500, images),
            "height": rng.integers(200, 500, images),
            "format": "JPEG",
            "brightness": rng.uniform(40, 200, images),
            "group": np.arange(images),
        }
    )
    sharpness = rng.uniform(10, 900, images).astype(np.float32)
    tables = evaluation_tables(predictions, manifest, sharpness, temperature=1.6, resamples=10, seed=0)
    centres = rng.normal(0, 14, (classes, 2))
    tables["features"] = pd.DataFrame(
        {
            "label": np.asarray(names)[labels],
            "correct": predictions.correct,
            "x": centres[labels, 0] + rng.normal(0, 2.5, images),
            "y": centres[labels, 1] + rng.normal(0, 2.5, images),
        }
    )
    rows = [
        ("none", 0, 0.98),
        ("blur", 1, 0.97),
        ("blur", 5, 0.90),
        ("noise", 1, 0.9),
        ("noise", 5, 0.6),
        ("flip", 1, 0.99),
    ]
    tables["corruptions"] = pd.DataFrame(
        [(name, severity, 500, a, a - 0.02, min(1, a + 0.01), 0.98 - a) for name, severity, a in rows],
        columns=["corruption", "severity", "images", "accuracy", "low", "high", "lost"],
    )
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (labels, predictions.predicted), 1)
    return predictions, tables, matrix


def drawings(predictions, tables, matrix):
    """Every drawing of tables, by name, as functions of the path."""
    metrics, classes = tables["metrics"], tables["classes"]
    return {
        "confusion": lambda path: evaluation_plots.plot_confusion(matrix, predictions.class_names, path),
        "roc": lambda path: evaluation_plots.plot_roc(tables["roc"], metrics, classes, path),
        "precision_recall": lambda path: evaluation_plots.plot_precision_recall(
            tables["precision_recall"], metrics, classes, path
        ),
        "calibration": lambda path: evaluation_plots.plot_calibration(tables["calibration"], path),
        "scores": lambda path: evaluation_plots.plot_scores(tables["scores"], classes, predictions.threshold, path),
        "feature_map": lambda path: evaluation_plots.plot_feature_map(tables["features"], path),
        "slices": lambda path: evaluation_plots.plot_slices(tables["slices"], metrics, path),
        "corruptions": lambda path: evaluation_plots.plot_corruptions(tables["corruptions"], path),
    }


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws for real, and returns the figure, to be looked into."""
    figures = []

    def save_and_keep(figure, path):
        plots.save_figure(figure, path)
        figures.append(figure)

    real = plots.save_figure
    monkeypatch.setattr(evaluation_plots, "save_figure", save_and_keep)

    def draw(function, *arguments):
        if function is plot_learning_curves:
            monkeypatch.setattr(plots, "save_figure", lambda figure, path: (figures.append(figure), real(figure, path)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            function(*arguments, tmp_path / "x.png")
        monkeypatch.setattr(plots, "save_figure", real)
        assert Image.open(tmp_path / "x.png").format == "PNG"
        return figures[-1]

    return draw


def headline(figure):
    return figure.get_suptitle().replace("\n", " ")


def legend_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def labels_of(figure):
    """Headline, titles, axis labels, legends and free texts, with their boxes in pixels."""
    texts = [text for legend in figure.legends for text in legend.get_texts()] + list(figure.texts)
    for axis in [*figure.axes, *(inset for one in figure.axes for inset in one.child_axes)]:
        texts += [axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
    return boxes_of(texts)


def boxes_of(texts):
    return [(text, text.get_window_extent()) for text in texts if text.get_text().strip()]


def overlapping(boxes):
    return [
        (one[0].get_text(), other[0].get_text())
        for one, other in itertools.combinations(boxes, 2)
        if min(one[1].x1, other[1].x1) - max(one[1].x0, other[1].x0) > 1
        and min(one[1].y1, other[1].y1) - max(one[1].y0, other[1].y0) > 1
    ]


# Of all


@EVERY_SIZE
def test_every_drawing_is_small_and_readable_and_the_same_each_time(drawn, tmp_path, classes, images):
    for name, draw in drawings(*made(classes, images)).items():
        figure = drawn(draw)
        assert [path.name for path in tmp_path.iterdir()] == ["x.png"], name
        assert (tmp_path / "x.png").stat().st_size < 500_000, name
        width, height = figure.get_size_inches() * figure.dpi
        labels = labels_of(figure)
        assert len(labels) > 1, name
        for text, box in labels:
            inside = box.x0 > -2 and box.y0 > -2 and box.x1 < width + 2 and box.y1 < height + 2
            assert inside, (name, text.get_text(), box, width, height)
        assert overlapping(labels) == [], name
        if classes == 3 or (classes == 37 and name in ("feature_map", "scores")):
            first = (tmp_path / "x.png").read_bytes()
            draw(tmp_path / "x.png")
            assert (tmp_path / "x.png").read_bytes() == first, name


def test_names_that_would_be_a_formula_or_be_left_out_are_drawn_as_they_are(drawn):
    predictions, tables, matrix = made(2, 200, names=tuple(DOLLARS))
    for draw in drawings(predictions, tables, matrix).values():
        drawn(draw)
    assert any("_hidden" in text for text in legend_of(drawn(drawings(predictions, tables, matrix)["scores"])))


def test_an_all_right_model_and_a_guessing_one_can_be_drawn(drawn):
    for skill in (60, 0.1):
        draw = drawings(*made(2, 200, skill))
        for name in ("confusion", "roc", "precision_recall", "calibration", "scores"):
            drawn(draw[name])


# Numbers as text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 5, "0 %"),
        (5, 5, "100 %"),
        (1, 2, "50.0 %"),
        (2399, 2400, "99.96 %"),
        (1, 100_000, "0.001 %"),
        (0.982, 1, "98.2 %"),
        (0, 0, "0 %"),
    ],
)
def test_nearly_all_is_never_called_all(part, whole, text):
    assert percent(part, whole) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.9981, "0.9981"), (0.99996, "0.99996"), (1.0, "1.0000"), (0.00001, "0.00001"), (0.5, "0.5000")],
)
def test_areas_are_rounded_to_four_digits_but_not_to_one(value, text):
    assert decimals(value, 4) == text


# Confusion


def test_confusion_says_how_many_are_right_and_shows_every_count(drawn):
    figure = drawn(evaluation_plots.plot_confusion, np.array([[1190, 10], [33, 1167]]), ["cat", "dog"])
    assert headline(figure) == "98.2 % of 2,400 test pictures right, 43 wrong"
    texts = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert texts == {"1,190": (0, 0), "10": (1, 0), "33": (0, 1), "1,167": (1, 1)}
    assert np.allclose(figure.axes[0].images[0].get_array(), [[1190 / 1200, 10 / 1200], [33 / 1200, 1167 / 1200]])


def test_confusion_of_many_classes_leaves_the_zeros_out(drawn):
    matrix = np.diag(np.full(37, 60))
    matrix[3, 30] = 5
    figure = drawn(evaluation_plots.plot_confusion, matrix, BREEDS)
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["5"] + ["60"] * 37
    ticks = figure.axes[0].get_xticklabels() + figure.axes[0].get_yticklabels()
    assert [text.get_text() for text in ticks] == BREEDS * 2
    boxes = boxes_of(ticks)
    assert overlapping(boxes[:37]) == overlapping(boxes[37:]) == []


def test_confusion_keeps_two_classes_without_zero_counts_readable(drawn):
    figure = drawn(evaluation_plots.plot_confusion, np.array([[3, 0], [0, 3]]), ["cat", "dog"])
    assert headline(figure) == "100 % of 6 test pictures right, 0 wrong"
    assert [text.get_text() for text in figure.axes[0].texts] == ["3", "0", "0", "3"]


def test_confusion_of_a_thousand_classes_is_a_bearable_picture(drawn, tmp_path):
    count = 400
    figure = drawn(evaluation_plots.plot_confusion, np.eye(count, dtype=np.int64), [f"class {n}" for n in range(count)])
    assert len(figure.axes[0].get_xticklabels()) <= 120
    assert max(Image.open(tmp_path / "x.png").size) < 2000


# Curves


def insets(figure):
    return figure.axes[0].child_axes


def curves_table(points, columns):
    return pd.DataFrame(
        [(name, *point) for name, line in points.items() for point in line], columns=["class", *columns]
    )


ROC = ("false_positive_rate", "true_positive_rate")
METRICS = pd.DataFrame(
    [("roc_auc", 0.97, 0.95, 0.98), ("pr_auc", 0.96, 0.94, 0.97), ("accuracy", 0.98, 0.97, 0.99)],
    columns=["metric", "value", "low", "high"],
)
TWO = pd.DataFrame({"class": ["cat", "dog"], "images": [75, 25], "precision": [0.9, 0.8], "recall": [0.95, 0.85]})
THREE = pd.DataFrame({"class": list("abc"), "images": 10, "precision": 0.9, "recall": 0.9})


def test_roc_of_two_classes_is_one_curve_with_the_point_in_use(drawn):
    line = [(0, 0), (0, 0.5), (0.4, 0.9), (1, 1)]
    figure = drawn(evaluation_plots.plot_roc, curves_table({"dog": line}, ROC), METRICS, TWO)
    assert headline(figure) == "ROC area 0.9700 (95 % interval 0.9500 to 0.9800)"
    assert legend_of(figure) == ["chance", "dog: area 0.8500", "at the threshold"]
    _, curve, point = figure.axes[0].lines
    assert curve.get_xydata().tolist() == [list(pair) for pair in line]
    assert point.get_xydata().tolist() == [[pytest.approx(1 - 0.95), 0.85]]
    assert insets(figure) == []


@pytest.mark.parametrize("distance", [0.001, 0.003, 0.01, 0.04])
def test_curves_that_hug_the_corner_are_enlarged(drawn, distance):
    line = [(0, 0), (0, 1 - 2 * distance), (distance, 1 - distance), (2 * distance, 1), (1, 1)]
    roc = drawn(evaluation_plots.plot_roc, curves_table({"dog": line}, ROC), METRICS, TWO)
    mirrored = [(y, 1 - x) for x, y in line]
    recall = drawn(
        evaluation_plots.plot_precision_recall, curves_table({"dog": mirrored}, ("recall", "precision")), METRICS, TWO
    )
    for figure, x in ((roc, distance), (recall, 1 - distance)):
        (inset,) = insets(figure)
        (left, right), (bottom, top) = inset.get_xlim(), inset.get_ylim()
        # The nearest point lies within, and not squeezed into the corner.
        assert left < x < right
        assert bottom < 1 - distance < top
        assert 0.05 < distance / (right - left) < 0.5


def test_a_perfect_curve_is_not_enlarged(drawn):
    figure = drawn(evaluation_plots.plot_roc, curves_table({"dog": [(0, 0), (0, 1), (1, 1)]}, ROC), METRICS, TWO)
    assert insets(figure) == []


def test_of_many_classes_the_weakest_three_are_named(drawn):
    predictions, tables, matrix = made(12, skill=3.0)
    areas = {
        name: np.trapezoid(one["true_positive_rate"], one["false_positive_rate"])
        for name, one in tables["roc"].groupby("class")
    }
    legend = legend_of(drawn(drawings(predictions, tables, matrix)["roc"]))
    weakest = sorted(areas, key=areas.get)[:3]
    assert legend == [
        "chance",
        "the other 9 classes",
        *(f"{name}: area {areas[name]:.4f}" for name in weakest),
        "mean of 12 classes",
    ]


def test_area_under_the_mean_roc_is_the_mean_of_the_areas(drawn):
    lines = {
        "a": [(0, 0), (0, 0.6), (0.5, 0.9), (1, 1)],
        "b": [(0, 0), (0.2, 0.2), (0.2, 1), (1, 1)],
        "c": [(0, 0), (1, 1)],
    }
    figure = drawn(evaluation_plots.plot_roc, curves_table(lines, ROC), METRICS, THREE)
    (mean,) = [line for line in figure.axes[0].lines if line.get_label() == "mean of 3 classes"]
    x, y = mean.get_xydata().T
    expected = np.mean([np.trapezoid(*np.array(line).T[::-1]) for line in lines.values()])
    assert np.trapezoid(y, x) == pytest.approx(expected, abs=1e-6)
    assert (np.diff(x) >= 0).all() and (np.diff(y) >= 0).all()


def test_precision_recall_is_the_same_from_either_end(tmp_path, drawn):
    _, tables, _ = made(3)
    table = tables["precision_recall"]
    for name, one in (("rising", table), ("falling", table.iloc[::-1].sort_values("class", kind="stable"))):
        evaluation_plots.plot_precision_recall(one, tables["metrics"], tables["classes"], tmp_path / f"{name}.png")
    assert (tmp_path / "rising.png").read_bytes() == (tmp_path / "falling.png").read_bytes()


def test_precision_recall_counts_the_precision_of_the_higher_recall(drawn):
    line = curves_table({"dog": [(0, 1), (0.5, 0.8), (1, 0.4)]}, ("recall", "precision"))
    figure = drawn(evaluation_plots.plot_precision_recall, line, METRICS, TWO)
    assert legend_of(figure)[1] == f"dog: area {0.5 * 0.8 + 0.5 * 0.4:.4f}"
    chance, curve, point = figure.axes[0].lines
    assert curve.get_drawstyle() == "steps-pre"
    assert list(chance.get_ydata()) == [0.25, 0.25]
    assert point.get_xydata().tolist() == [[0.85, 0.8]]


def test_mean_precision_is_taken_at_equal_recall(drawn):
    columns = ("recall", "precision")
    lines = {"a": [(0, 1), (1, 1)], "b": [(0, 1), (0.5, 0.7), (1, 0.4)], "c": [(0, 1), (0.25, 0.1), (1, 0.1)]}
    figure = drawn(evaluation_plots.plot_precision_recall, curves_table(lines, columns), METRICS, THREE)
    (mean,) = [line for line in figure.axes[0].lines if line.get_label() == "mean of 3 classes"]
    at = dict(zip(mean.get_xdata().round(3), mean.get_ydata(), strict=True))
    assert at[0.4] == pytest.approx((1 + 0.7 + 0.1) / 3)
    assert at[0.6] == pytest.approx((1 + 0.4 + 0.1) / 3)


def test_without_curves_the_picture_says_so(drawn):
    for draw, columns in (
        (evaluation_plots.plot_roc, ROC),
        (evaluation_plots.plot_precision_recall, ("recall", "precision")),
    ):
        for classes in (TWO, THREE):
            figure = drawn(draw, pd.DataFrame(columns=["class", *columns]), METRICS.head(0), classes)
            assert headline(figure) == "No curve: the test pictures are of one class"


# Calibration

RELIABILITY = pd.DataFrame(
    [
        ("before", 0.8, 0.9, 30, 0.85, 0.75),
        ("before", 0.9, 1.0, 10, 0.95, 0.80),
        ("after", 0.7, 0.8, 30, 0.75, 0.75),
        ("after", 0.8, 0.9, 10, 0.84, 0.80),
    ],
    columns=["calibration", "bin_low", "bin_high", "images", "confidence", "accuracy"],
)


def test_calibration_compares_before_and_after(drawn):
    figure = drawn(evaluation_plots.plot_calibration, RELIABILITY)
    assert headline(figure) == "Expected calibration error 0.0100, before the temperature 0.1125"
    assert legend_of(figure)[1:] == [
        "before the temperature: calibration error 0.1125",
        "as saved: calibration error 0.0100",
    ]
    above, below = figure.axes
    assert [round(bar.get_height()) for bar in below.patches] == [30, 10, 30, 10]
    for bar, low in zip(below.patches, [0.8, 0.9, 0.7, 0.8], strict=True):
        assert low <= bar.get_x() and bar.get_x() + bar.get_width() <= low + 0.1 + 1e-9
    left, right = above.get_xlim()
    assert left < 0.7 and right > 1


def test_calibration_without_a_temperature_is_drawn_once(drawn):
    same = pd.concat([RELIABILITY.tail(2), RELIABILITY.tail(2).assign(calibration="before")])
    figure = drawn(evaluation_plots.plot_calibration, same)
    assert headline(figure) == "Expected calibration error 0.0100: 77.2 % confident on average"
    assert len(legend_of(figure)) == 2


def test_scores_of_two_classes_count_the_wrong_side(drawn):
    scores = pd.DataFrame(
        [("cat", 0.0, 0.5, 95), ("cat", 0.5, 1.0, 5), ("dog", 0.0, 0.5, 2), ("dog", 0.5, 1.0, 48)],
        columns=["class", "bin_low", "bin_high", "images"],
    )
    classes = pd.DataFrame({"class": ["cat", "dog"], "images": [100, 50], "recall": [0.93, 0.98]})
    figure = drawn(evaluation_plots.plot_scores, scores, classes, 0.47)
    assert headline(figure) == "7 of 100 cat pictures and 1 of 50 dog pictures on the wrong side of the threshold"
    assert legend_of(figure) == ["cat (100)", "dog (50)", "threshold 0.47"]
    (axis,) = figure.axes
    assert axis.get_xlabel() == "probability of dog"
    assert axis.get_yscale() == "log"
    assert set(axis.lines[0].get_xdata()) == {0.47}
    assert [patch.get_data().values.tolist() for patch in axis.patches[::2]] == [[95, 5], [2, 48]]


@pytest.mark.parametrize(("classes", "outlines"), [(3, 3), (4, 4), (5, 1), (37, 1)])
def test_scores_of_many_classes_are_of_the_true_one(drawn, classes, outlines):
    predictions, tables, matrix = made(classes)
    figure = drawn(drawings(predictions, tables, matrix)["scores"])
    true = predictions.probabilities[np.arange(2400), predictions.labels]
    assert headline(figure).startswith(f"{percent(int((true >= 0.5).sum()), 2400)} of 2,400 test pictures")
    patches = figure.axes[0].patches[:: 2 if outlines > 1 else 1]
    assert len(patches) == outlines
    assert sum(patch.get_data().values.sum() for patch in patches) == 2400
    assert len(legend_of(figure)) == (outlines if outlines > 1 else 0)


# Feature map


def test_feature_map_rings_the_wrong_ones(drawn):
    _, tables, _ = made(3)
    features = tables["features"]
    figure = drawn(evaluation_plots.plot_feature_map, features)
    wrong = features[~features["correct"]]
    *classes, rings = figure.axes[0].collections
    assert np.allclose(rings.get_offsets(), wrong[["x", "y"]])
    assert [len(points.get_offsets()) for points in classes] == [800, 800, 800]
    assert len({tuple(points.get_facecolor()[0]) for points in classes}) == 3
    assert headline(figure).endswith(f"the {len(wrong)} wrong ones are ringed")
    assert legend_of(figure) == [f"{name} (800)" for name in BREEDS[:3]]


@pytest.mark.parametrize(("wrong", "end"), [(0, "none of them is wrong"), (1, "the wrong one is ringed")])
def test_feature_map_with_hardly_a_mistake(drawn, wrong, end):
    features = made(2, 6, 60)[1]["features"].copy()
    features["correct"] = np.arange(6) >= wrong
    assert headline(drawn(evaluation_plots.plot_feature_map, features)).endswith(end)


def test_feature_map_of_many_classes_names_each_beside_its_points(drawn):
    figure = drawn(evaluation_plots.plot_feature_map, made(37)[1]["features"])
    assert legend_of(figure) == []
    names = ["".join(text.get_text().split("\n")) for text in figure.axes[0].texts]
    assert names == BREEDS
    assert overlapping(boxes_of(figure.axes[0].texts)) == []
    looks = {
        (tuple(points.get_facecolor()[0][:3]), points.get_paths()[0].vertices.tobytes())
        for points in figure.axes[0].collections[:37]
    }
    assert len(looks) == 37  # no two classes look the same


def test_boxes_are_pushed_apart_and_stay_near():
    rng = np.random.default_rng(0)
    centres = np.vstack([rng.uniform(100, 900, (30, 2)), np.full((5, 2), 500.0)])
    sizes = np.tile([90.0, 20.0], (35, 1))
    placed = evaluation_plots._push_apart(centres, sizes, np.array([[0, 0], [1000, 1000]]))
    offset = np.abs(placed[:, None] - placed[None]) + 1000 * np.eye(35)[..., None]
    assert ((offset[..., 0] >= 90) | (offset[..., 1] >= 20)).all()
    assert np.abs(placed - centres).max() < 150
    far = np.array([[10.0, 10.0], [500.0, 500.0]])
    assert evaluation_plots._push_apart(far, sizes[:2], np.array([[-100, -100], [1000, 1000]])).tolist() == far.tolist()


# Slices and corruptions


def slices_table(weak):
    rows = [
        ("brightness", "below 80", 100, 14, 0.86, 0.78, 0.91, weak),
        ("brightness", "80 and more", 300, 3, 0.99, 0.97, 0.997, False),
        ("file format", "JPEG", 400, 17, 0.9575, 0.93, 0.973, False),
    ]
    return pd.DataFrame(rows, columns=["property", "slice", "images", "errors", "accuracy", "low", "high", "weak"])


def test_weak_slices_stand_out(drawn):
    figure = drawn(evaluation_plots.plot_slices, slices_table(weak=True), METRICS)
    assert headline(figure) == "1 of 3 slices weaker than the rest: brightness below 80"
    assert legend_of(figure) == ["all test pictures: 98.0 %", "weaker than the rest", "slice, with its 95 % interval"]
    (axis,) = figure.axes
    bold = [text.get_text() for text in axis.texts if text.get_weight() == "bold"]
    assert bold == ["brightness", "14 of 100 wrong", "file format"]
    points = [line for line in axis.lines if line.get_marker() in "oD"]
    assert [(line.get_xdata()[0], line.get_marker()) for line in points] == [(0.86, "D"), (0.99, "o"), (0.9575, "o")]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["below 80", "80 and more", "JPEG"]
    # From above to below, in the order of the table.
    rows = [line.get_ydata()[0] for line in points]
    assert rows == sorted(rows) == list(axis.get_yticks())
    assert axis.get_ylim()[0] > axis.get_ylim()[1]


def test_without_a_weak_slice_the_headline_says_so(drawn):
    figure = drawn(evaluation_plots.plot_slices, slices_table(weak=False), METRICS)
    assert headline(figure) == "None of 3 slices is clearly weaker than the rest"


def test_intervals_of_slices_lie_inside_the_axis(drawn):
    for table in (slices_table(weak=False), slices_table(weak=False).assign(accuracy=1, low=1, high=1)):
        left, right = drawn(evaluation_plots.plot_slices, table, METRICS).axes[0].get_xlim()
        assert left < table["low"].min() and right > table["high"].max()
        assert right - left > 0.05


def test_corruptions_are_drawn_worst_first_against_the_clean_pictures(drawn):
    table = made(2)[1]["corruptions"]
    figure = drawn(evaluation_plots.plot_corruptions, table)
    assert headline(figure) == (
        "98.0 % of 500 pictures right as they are (dashed line); noise costs most: 60.0 % right at severity 5"
    )
    assert [axis.get_title() for axis in figure.axes] == [
        "noise\n38.0 points lost",
        "blur\n8.0 points lost",
        "flip\n1.0 points gained",
    ]
    for axis, name in zip(figure.axes, ("noise", "blur", "flip"), strict=True):
        rows = table[table["corruption"] == name]
        clean, points = axis.lines[:2]
        assert set(clean.get_ydata()) == {0.98}
        assert points.get_xydata().tolist() == rows[["severity", "accuracy"]].to_numpy().tolist()
        bottom, top = axis.get_ylim()
        assert bottom < table["low"].min() and top > table["high"].max()


def test_corruption_that_costs_nothing(drawn):
    table = made(2)[1]["corruptions"].iloc[[0, 1]].copy()
    table.loc[1, ["accuracy", "lost"]] = 0.98, 0.0
    assert drawn(evaluation_plots.plot_corruptions, table).axes[0].get_title() == "blur\nnothing lost"


# Gallery


def solid(color, height=40, width=40):
    return np.full((height, width, 3), color, np.uint8)


def box_of(image, color):
    rows, columns = np.nonzero((image == color).all(axis=2))
    return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1


RED, GREEN, NAVY = (200, 30, 40), (30, 200, 40), (30, 40, 200)


def gallery(tmp_path, pictures, captions, **settings):
    evaluation_plots.plot_gallery(pictures, captions, tmp_path / "x.png", title="The worst", **settings)
    return np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))


def test_gallery_shows_pictures_whole_and_in_order(tmp_path):
    shown = gallery(tmp_path, [solid(RED, 40, 80), solid(GREEN, 80, 40)], ["one", "two"], side=100)
    top, bottom, left, right = box_of(shown, RED)
    assert (bottom - top, right - left) == (50, 100)
    other = box_of(shown, GREEN)
    assert (other[1] - other[0], other[3] - other[2]) == (100, 50)
    assert right < other[2]
    assert (top + bottom) / 2 == (other[0] + other[1]) / 2


def test_overlay_stands_right_of_its_picture(tmp_path):
    shown = gallery(
        tmp_path, [solid(RED), solid(NAVY)], ["one", "two"], overlays=[solid(GREEN), solid((9, 9, 9))], side=40
    )
    red, green, navy = (box_of(shown, color) for color in (RED, GREEN, NAVY))
    assert red[:2] == green[:2] == navy[:2]
    assert red[3] < green[2] < green[3] < navy[2]


def test_overlays_and_pictures_must_be_as_many(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        gallery(tmp_path, [solid(RED), solid(NAVY)], ["one", "two"], overlays=[solid(GREEN)])


@pytest.mark.parametrize("overlaid", [False, True])
def test_long_captions_touch_neither_the_next_one_nor_a_picture(tmp_path, overlaid):
    captions = [f"{name}, called {other}\n98.2 %" for name, other in zip(BREEDS, BREEDS[::-1], strict=True)]
    pictures = [solid(RED)] * 37
    settings = {"overlays": [solid(GREEN)] * 37} if overlaid else {}
    shown = gallery(tmp_path, pictures, captions, **settings)
    without = gallery(tmp_path, pictures, [""] * 37, **settings)
    red = (shown == RED).all(axis=2).sum()
    assert red == (without == RED).all(axis=2).sum()  # no caption lies on a picture
    # Between the columns of pictures there is a stripe that no caption enters.
    filled = (shown == RED).all(axis=2) | (shown == GREEN).all(axis=2)
    columns = np.flatnonzero(filled.any(axis=0))
    for end, start in itertools.pairwise(columns):
        if start - end > 10:
            assert (shown[60:, end + 6 : start - 1] == 255).all()


def test_captions_stand_below_their_picture_and_rows_apart(tmp_path):
    count = 37
    shown = gallery(tmp_path, [solid(RED)] * count, ["a\nb\nc"] * count)
    ink = (shown != 255).any(axis=2)[50:]
    red = (shown == RED).all(axis=2)[50:].any(axis=1)
    text = ink.any(axis=1) & ~red
    # From the top: picture, three lines, picture, three lines, ...
    starts = np.flatnonzero(np.diff(red.astype(int)) == -1)
    assert len(starts) > 2
    for start, end in zip(starts, [*starts[1:], len(red)], strict=True):
        lines = np.diff(text[start:end].astype(int)) == 1
        assert lines.sum() == 3
        below = np.flatnonzero(red[start + 1 : end])
        assert below.size == 0 or below[0] - np.flatnonzero(text[start:end])[-1] > 8


def test_gallery_without_pictures_is_its_title(tmp_path):
    shown = gallery(tmp_path, [], [])
    assert shown.shape[0] < 100
    assert (shown < 128).any()
    assert gallery(tmp_path, [], [], overlays=[]).shape == shown.shape


def test_many_pictures_are_shown_smaller(tmp_path):
    def side(count):
        shown = gallery(tmp_path, [solid(RED)] * count, ["x"] * count)
        top, _, left, _ = box_of(shown, RED)
        row = (shown[top] == RED).all(axis=1)[left:]
        return int(np.argmin(row))

    sides = [side(count) for count in (1, 24, 60, 120, 400)]
    assert sides[0] == sides[1] == 160
    assert sides[1] > sides[2] > sides[3] > sides[4] == 64


def test_gallery_of_busy_pictures_is_a_small_file_and_the_same_each_time(tmp_path):
    rng = np.random.default_rng(0)
    # As busy as photographs: smooth shapes and some noise.
    coarse = [rng.integers(0, 255, (12, 16, 3), np.uint8) for _ in range(24)]
    pictures = [fit_picture(one, 400) for one in coarse]
    captions = ["american_pit_bull_terrier, called cat\n99.9 %"] * 24
    gallery(tmp_path, pictures, captions, overlays=pictures)
    first = (tmp_path / "x.png").read_bytes()
    gallery(tmp_path, pictures, captions, overlays=pictures)
    assert (tmp_path / "x.png").read_bytes() == first
    assert len(first) < 1.5e6


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("cat, called dog", ["cat, called", "dog"]),
        ("american_pit_bull_terrier", ["american_pit", "_bull_", "terrier"]),
        ("a-b/c", ["a-b/c"]),
        ("abcdefghijklmnopqrst", ["abcdefghijkl", "mnopqrst"]),
        ("one\ntwo", ["one", "two"]),
        ("", [""]),
    ],
)
def test_long_lines_break_where_a_word_ends(text, lines):
    wrapped = evaluation_plots._wrap(text, 12)
    assert all(len(line) <= 12 for line in wrapped.split("\n"))
    assert "".join(wrapped.split()) == "".join(text.split())
    if "american" not in text:
        assert wrapped.split("\n") == lines


# Learning curves


def history(epochs, fine_tuned=0, first_loss=0.7):
    steps = np.arange(epochs + fine_tuned)
    return pd.DataFrame(
        {
            "epoch": steps + 1,
            "phase": ["head"] * epochs + ["fine_tune"] * fine_tuned,
            "train_loss": [first_loss, *0.5 * 0.9 ** steps[1:]],
            "val_loss": 0.6 * 0.9**steps,
            "train_accuracy": 1 - 0.4 * 0.9**steps,
            "val_accuracy": 1 - 0.3 * 0.9**steps,
        }
    )


@pytest.mark.parametrize("epochs", [1, 2, 8, 9, 13, 70, 100])
def test_epochs_are_marked_by_whole_numbers_in_even_steps(drawn, epochs):
    for axis in drawn(plot_learning_curves, history(epochs), epochs).axes:
        low, high = axis.get_xlim()
        ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
        assert all(tick == round(tick) >= 0 for tick in ticks)
        assert len(set(np.diff(ticks))) <= 1
        assert len(ticks) <= 10
        if epochs <= 8:
            assert [tick for tick in ticks if 1 <= tick <= epochs] == list(range(1, epochs + 1))


def test_fine_tuning_has_a_background_of_its_own(drawn):
    figure = drawn(plot_learning_curves, history(12, 6), 16)
    assert legend_of(figure) == ["fine-tuning", "training", "validation", "kept: epoch 16"]
    for axis in figure.axes:
        (span,) = axis.patches
        assert span.get_x() == 12.5
        assert span.get_x() + span.get_width() == 18.5
    assert legend_of(drawn(plot_learning_curves, history(12), 10))[0] == "training"


def test_learning_curves_say_what_is_kept(drawn):
    table = history(12)
    figure = drawn(plot_learning_curves, table, 10)
    kept = table.iloc[9]
    assert headline(figure) == (
        f"Kept: epoch 10 of 12, validation loss {kept['val_loss']:.4f} and accuracy {100 * kept['val_accuracy']:.1f} %"
    )
    for axis, quantity in zip(figure.axes, ("loss", "accuracy"), strict=True):
        (point,) = [line for line in axis.lines if line.get_marker() == "D"]
        assert point.get_xydata().tolist() == [[10, kept[f"val_{quantity}"]]]


def test_first_epoch_far_off_does_not_press_the_others_flat(drawn):
    assert drawn(plot_learning_curves, history(12), 10).axes[0].get_yscale() == "linear"
    assert drawn(plot_learning_curves, history(12, first_loss=40), 10).axes[0].get_yscale() == "log"
    zero = history(12, first_loss=40).assign(val_loss=0.0)
    assert drawn(plot_learning_curves, zero, 10).axes[0].get_yscale() == "linear"


# What the others share


@pytest.mark.parametrize(("shape", "fitted"), [((400, 200), (100, 50)), ((20, 40), (50, 100)), ((1, 5000), (1, 100))])
def test_pictures_are_fitted_with_their_aspect_kept(shape, fitted):
    pixels = np.full((*shape, 3), 77, np.uint8)
    assert fit_picture(pixels, 100).shape == (*fitted, 3)
    assert (fit_picture(pixels, 100) == 77).all()


def test_plain_text():
    assert plain_text("a $b$ c") == r"a \$b\$ c"
    assert plain_text("_a") == " _a"
