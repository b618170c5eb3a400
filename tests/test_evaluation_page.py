"""The report page: every sentence follows from the numbers, it carries all inside itself, and always is the same."""

import base64
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from catdog.compared_runs import parse_predictions
from catdog.comparison import ComparedRun, compare, format_text
from catdog.config import PromoteParams
from catdog.evaluation import LabelledPredictions, compute_metrics, prediction_table
from catdog.evaluation_page import embed_picture, embed_pictures, render_report, write_report
from catdog.evaluation_pictures import choose_galleries, collect_galleries, draw_gallery, draw_tables
from catdog.evaluation_tables import evaluation_tables, robustness_table
from catdog.feature_map import feature_table
from catdog.gate import Candidate, check, failures
from catdog.images import encode_jpeg
from catdog.model_card import render_model_card
from catdog.report_content import (
    METRIC_NAMES,
    calibration_error,
    confusion_rows,
    describe_weights,
    findings,
    metric_range,
    metric_value,
    percent,
)
from sample_report import (
    CORRUPTIONS,
    PICTURES,
    SHIPPED,
    class_table,
    corruption_table,
    draw_pictures,
    draw_predictions,
    make_content,
    slice_table,
)

BREEDS = tuple(f"american_pit_bull_terrier_{number}" for number in range(37))
NASTY = ("<b>bold</b>", "a\"onerror='x'&amp;", "line\nbreak\u202e {{ 7*7 }}")


class Page(HTMLParser):
    """What a reader gets to see of a page, and what it would load."""

    def __init__(self, text: str):
        super().__init__()
        self.source, self.tags, self.links, self.images, self.tables, self.items = text, [], [], [], [], []
        self._text, self._open = [], []
        self.feed(text)
        assert self._open == []
        self.text = " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        if tag not in ("meta", "link", "img"):
            self._open.append(tag)
        self.links += [found[name] for name in ("src", "href", "srcset", "action", "data") if found.get(name)]
        if tag == "img":
            self.images.append(found)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "li":
            self.items.append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if {"style", "title"} & set(self._open):
            return
        self._text.append(data)
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data
        if "li" in self._open:
            self.items[-1] += data

    def rows(self, heading: str) -> list[list[str]]:
        """The rows of the table whose first column has this heading."""
        (found,) = [table for table in self.tables if table[0][0] == heading]
        return found[1:]


def render(**changes) -> Page:
    return Page(render_report(make_content(**changes)))


def sentences(kind: str | None = None, **changes) -> list[str]:
    """The findings, all or those of one kind."""
    return [one.text for one in findings(make_content(**changes)) if kind in (None, one.kind)]


def only(texts: list[str], part: str) -> str:
    """The one text that holds this part."""
    (found,) = [text for text in texts if part in text]
    return found


def none(texts: list[str], part: str) -> bool:
    return not [text for text in texts if part in text]


def predictions(*rows) -> pd.DataFrame:
    """From label, predicted, confidence and how often."""
    each = [(label, predicted, confidence) for label, predicted, confidence, count in rows for _ in range(count)]
    table = pd.DataFrame(each, columns=["label", "predicted", "confidence"])
    return table.assign(path=[f"{number}.jpg" for number in range(len(table))], correct=table.label == table.predicted)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.9667, "96.7 %"), (1.0, "100.0 %"), (0.0, "0.0 %"), (0.9996, "99.96 %"), (0.99996, "99.996 %"),
        (0.0004, "0.04 %"), (None, "n/a"), (float("nan"), "n/a"),
    ],
)  # fmt: skip
def test_percent_makes_neither_all_of_nearly_all_nor_nothing_of_little(value, text):
    assert percent(value) == text


def test_metrics_that_are_no_shares_keep_their_own_unit():
    assert metric_value("log_loss", 0.08532) == "0.0853"
    assert metric_value("ece", 0.0213) == "2.1 %"
    assert metric_value("roc_auc", float("nan")) == metric_value("roc_auc", None) == "n/a"
    assert metric_range("log_loss", 0.07, 0.1) == "0.0700 to 0.1000"
    assert metric_range("accuracy", float("nan"), 1.0) == "n/a"


def test_calibration_error_weighs_each_bin_by_its_images():
    rows = [("before", 30, 0.9, 0.7), ("before", 10, 0.6, 0.8), ("after", 40, 0.8, 0.75)]
    table = pd.DataFrame(rows, columns=["calibration", "images", "confidence", "accuracy"])
    assert calibration_error(table, "before") == pytest.approx((30 * 0.2 + 10 * 0.2) / 40)
    assert calibration_error(table, "after") == pytest.approx(0.05)
    assert np.isnan(calibration_error(table[:2], "after"))


def test_confusions_are_counted_and_compared_with_the_class():
    table = predictions(("cat", "dog", 0.8, 3), ("cat", "cat", 0.9, 7), ("dog", "cat", 0.7, 1), ("dog", "dog", 0.9, 9))
    assert confusion_rows(make_content(predictions=table)) == [
        {"label": "cat", "predicted": "dog", "images": "3", "share": "30.0 %"},
        {"label": "dog", "predicted": "cat", "images": "1", "share": "10.0 %"},
    ]


def test_weights_are_described_one_network_at_a_time():
    one, other = describe_weights("mobilenetv2+vgg16", "imagenet+weights/mine.h5", f"{SHIPPED}+{'a' * 64}")
    assert (one["backbone"], one["licence"], one["sha256"]) == ("mobilenetv2", "Apache-2.0", SHIPPED)
    assert "TensorFlow Hub" in one["source"]
    assert (other["backbone"], other["sha256"]) == ("vgg16", "a" * 64)
    assert "weights/mine.h5" in other["source"]
    assert other["licence"].startswith("unknown")
    (both,) = describe_weights("vgg16", "a+b.h5", "b" * 64)
    assert "a+b.h5" in both["source"]
    assert [one["licence"] for one in describe_weights("mobilenetv2+vgg16", "random", "none+none")] == [
        "none needed"
    ] * 2


def test_result_is_told_with_its_interval_and_a_warning_where_that_is_wide():
    few, many = draw_predictions(["cat", "dog"], 120), draw_predictions(["cat", "dog"], 2400)
    assert only(sentences(predictions=few), "115 of 120 test images").endswith("95 % interval 90.6 % to 98.2 %.")
    assert "7.6 points wide" in only(sentences("check", predictions=few), "test split is small")
    assert none(sentences(predictions=many), "test split is small")


def test_a_test_split_without_mistakes_does_not_prove_perfection():
    texts = sentences("good", predictions=draw_predictions(["cat", "dog"], 300, wrong=0))
    # The rule of three: no failure in n tries leaves 3 / n.
    assert "above 99.0 %" in only(texts, "All 300 test images")
    assert none(sentences(predictions=draw_predictions(["cat", "dog"], 300, wrong=0)), "mistake")
    assert "60.0 points wide" not in sentences(predictions=draw_predictions(["cat", "dog"], 5, wrong=0))
    assert only(sentences("check", predictions=draw_predictions(["cat", "dog"], 6, wrong=0)), "50.0 points wide")


def test_a_model_no_better_than_the_largest_class_is_called_so():
    table = predictions(("cat", "cat", 0.9, 68), ("dog", "cat", 0.9, 32))
    assert "always saying cat, which is right for 68.0 %" in only(
        sentences("check", predictions=table), "always saying"
    )
    good = predictions(("cat", "cat", 0.9, 68), ("dog", "dog", 0.9, 31), ("dog", "cat", 0.9, 1))
    assert none(sentences(predictions=good), "always saying")
    assert none(sentences(predictions=predictions(("cat", "cat", 0.9, 50))), "always saying")


def test_classes_that_fall_behind_are_named_only_beyond_chance():
    names = ("cat", "dog", "fox")
    rows = [("cat", "cat", 0.9, 100), ("dog", "dog", 0.9, 99), ("dog", "cat", 0.6, 1), ("fox", "fox", 0.9, 80)]
    table = predictions(*rows, ("fox", "dog", 0.6, 20))
    texts = sentences(names=names, predictions=table)
    assert "fox, 80.0 % of its 100 images; best is cat, 100.0 %" in only(texts, "Recognised least is")
    assert only(sentences("check", names=names, predictions=table), "less often than the rest").endswith(": fox.")
    even = predictions(*rows[:2], ("dog", "cat", 0.6, 3), ("fox", "fox", 0.9, 98), ("fox", "cat", 0.6, 2))
    assert none(sentences(names=names, predictions=even), "less often than the rest")


def test_classes_with_few_or_no_test_images_are_told():
    table = predictions(("cat", "cat", 0.9, 100), ("dog", "dog", 0.9, 5))
    texts = sentences("check", names=("cat", "dog", "fox"), predictions=table)
    assert only(texts, "Without a test image").endswith(": fox.")
    assert only(texts, "fewer than 30 test images").startswith("1 of 2 classes")


@pytest.mark.parametrize(("confidence", "confident"), [(0.9, True), (0.89, False)])
def test_confident_mistakes_are_counted(confidence, confident):
    table = predictions(
        ("cat", "cat", 0.95, 90), ("dog", "dog", 0.95, 90), ("cat", "dog", confidence, 3), ("dog", "cat", 0.5, 4)
    )
    texts = sentences(predictions=table)
    if confident:
        assert only(texts, "with a probability of 90 % or more").startswith("3 of 7 mistakes")
    else:
        assert only(texts, "with a probability of 90 % or more").startswith("No mistake")
    assert only(texts, "most frequent mistake").endswith("dog called cat: 4 of 7 mistakes.")


def test_one_of_many_rare_mistakes_is_not_called_the_most_frequent():
    table = predictions(
        ("cat", "cat", 0.9, 90), ("dog", "dog", 0.9, 90), ("cat", "dog", 0.6, 3), ("dog", "cat", 0.6, 3)
    )
    assert none(sentences(predictions=table), "most frequent")


@pytest.mark.parametrize(
    ("confidence", "kind", "words"),
    [(0.99, "check", "too sure of itself"), (0.9, "good", "agree with"), (0.75, "check", "right more often")],
)
def test_confidence_is_compared_with_what_comes_true(confidence, kind, words):
    table = predictions(*((name, name, confidence, 450) for name in ("cat", "dog")), ("cat", "dog", confidence, 100))
    content = make_content(predictions=table)
    content = replace(content, metrics=content.metrics | {"ece": abs(0.9 - confidence)})
    found = [one for one in findings(content) if words in one.text]
    assert [one.kind for one in found] == [kind]
    assert f"on average {percent(confidence)} sure and 90.0 % right" in found[0].text


def test_probabilities_that_fit_only_on_average_are_told():
    table = predictions(*((name, name, 0.9, 900) for name in ("cat", "dog")), ("cat", "dog", 0.9, 200))
    content = make_content(predictions=table)
    for error, uneven in ((0.08, True), (0.03, False)):
        found = findings(replace(content, metrics=content.metrics | {"ece": error}))
        assert none([one.text for one in found if one.kind == "check"], "not at every height") != uneven


def test_weak_slices_are_named_and_their_absence_too():
    texts = sentences("check")
    assert "shorter side below 300 px: 9 of 62 images wrong, 85.5 % right, against 95.8 % of all" in only(
        texts, "Weak spot"
    )
    quiet = [("shorter side", "200 px", 240, 10, False), ("aspect", "wide", 240, 10, False)]
    assert "None of 2 slices by shorter side and aspect" in only(sentences("good", slices=quiet), "slices")
    assert none(sentences(slices=quiet), "Weak spot")


def test_the_corruption_that_costs_most_is_named():
    assert "Of 3 corruptions, Gaussian noise at severity 5 hurts most: 62.0 % right in place of 96.0 %" in only(
        sentences("check"), "hurts most"
    )
    assert only(sentences("note", corruptions=[("darker", 1, 0.955)]), "darker at severity 1")
    some = [("Gaussian blur", 5, 0.93), ("darker", 3, 0.7), ("darker", 5, 0.6), ("vertical flip", 1, 0.8)]
    assert only(sentences("check", corruptions=some), "darker at severity 5")
    assert only(sentences("good", corruptions=[("darker", 1, 0.96)]), "None of 1 corruption")


@pytest.mark.parametrize("table", ["absent", "first row alone"])
def test_robustness_that_was_not_measured_leads_to_the_command(table):
    content = make_content(corruptions=None)
    if table == "first row alone":
        content = replace(content, tables=content.tables | {"corruptions": corruption_table(0.96)})
    (found,) = [one for one in findings(content) if "not measured" in one.text]
    assert found.command == "dvc exp run -S evaluate.corruptions=500"
    page = Page(render_report(content))
    assert page.text.count("dvc exp run -S evaluate.corruptions=500") == 2
    assert not [rows for rows in page.tables if rows[0][0] == "corruption"]


def test_what_makes_numbers_too_good_or_unfair_is_told():
    assert only(sentences("check", params={"split.near_duplicate_bits": -1}), "Near-duplicates were not looked for")
    assert none(sentences(), "Near-duplicates")
    facts = make_content().facts
    leaking = sentences("check", facts=facts | {"leaks": 2})
    assert only(leaking, "2 images in more than one split")
    counts = facts["counts"] | {"train": {"cat": 200, "dog": 50}}
    assert "200 training images of cat, 50 of dog" in only(
        sentences("check", facts=facts | {"counts": counts}), "in size"
    )
    uneven = [one for one in findings(make_content(facts=facts | {"counts": counts})) if "in size" in one.text]
    assert [one.command for one in uneven] == ["dvc exp run -S train.class_weights=balanced"]
    content = make_content(facts=facts | {"counts": counts}, params={"train.class_weights": "balanced"})
    (balanced,) = [one for one in findings(content) if "in size" in one.text]
    assert balanced.text.endswith("50 of dog. The balanced accuracy counts them alike.")
    assert balanced.command == ""
    assert only(sentences(), "drawn by a program")
    assert none(sentences(facts=facts | {"dataset": "microsoft"}), "drawn by a program")


def test_training_that_was_cut_off_is_told():
    training = make_content().training
    ended = training | {"best_epoch": 100, "epochs": 100}
    assert "train.epochs = 100" in only(sentences("check", training=ended), "still fell")
    assert none(sentences(training=training | {"best_epoch": 90, "epochs": 100}), "still fell")
    assert none(sentences(training=training | {"best_epoch": 70, "epochs": 70}), "still fell")
    tuned = training | {"best_epoch": 80, "epochs": 80, "fine_tuning": {"kept": "yes", "epochs": 10}}
    assert "fine_tune.epochs = 10" in only(sentences("check", training=tuned), "still fell")


def test_page_shows_the_numbers_of_the_tables():
    page = render()
    assert [row[0] for row in page.rows("metric")] == [name for name, _ in METRIC_NAMES.values()]
    assert page.rows("metric")[0][1:3] == ["95.8 %", "92.5 % to 97.7 %"]
    assert [row[:2] for row in page.rows("class")] == [["cat", "120"], ["dog", "120"]]
    assert page.rows("property")[0] == ["shorter side", "below 300 px", "62", "9", "85.5 %", "74.7 % to 92.2 %", "weak"]
    assert [row[-1] for row in page.rows("property")] == ["weak", "", "", ""]
    rows = page.rows("corruption")
    assert [row[0] for row in rows] == ["none", *(name for name, _, _ in CORRUPTIONS)]
    assert rows[3][1] == "5"
    assert rows[3][2] == "standard deviation 38% of the range"
    assert rows[3][3] == "62.0 %"
    assert rows[3][5] == "34.0 points"
    assert page.rows("images of class") == [
        ["cat", "200", "40", "60"],
        ["dog", "200", "40", "60"],
        ["all", "400", "80", "120"],
    ]
    assert page.rows("network")[0][1] == "Apache-2.0"
    assert ["train.dropout", "0.5"] in page.rows("parameter")
    assert "994ce4e41f9fe459bac489ac137f4312" in page.text
    assert "calls an image dog from a probability of 0.5 on, else cat" in page.text
    tiles = re.findall(r'<div class="tile"><b>([^<]+)</b><span>([^<]+)</span>', page.source)
    assert tiles == [
        ("95.8 %", "accuracy"), ("0.0853", "log loss"), ("0.9969", "ROC AUC"), ("2.1 %", "calibration error"),
        ("240", "test images"), ("9.6 MB", "model file"),
    ]  # fmt: skip


def test_classes_are_ordered_with_the_lowest_f1_first():
    table = draw_predictions(BREEDS, 2400, wrong=0.09)
    page = render(names=BREEDS, predictions=table)
    shown = [float(row[4].split(" %")[0]) for row in page.rows("class")]
    assert len(shown) == 37
    assert shown == sorted(shown)
    assert shown[0] < shown[-1]
    assert "The model calls an image by the most probable class." in page.text


def test_metrics_that_are_not_defined_are_shown_as_such():
    content = make_content()
    metrics = content.tables["metrics"].copy()
    metrics.loc[metrics["metric"] == "roc_auc", ["value", "low", "high"]] = np.nan
    classes = class_table(content.tables["predictions"], ["cat", "dog", "fox"])
    tables = dict(content.tables) | {"metrics": metrics, "classes": classes}
    page = Page(render_report(replace(content, tables=tables, metrics=content.metrics | {"roc_auc": None})))
    assert ["ROC AUC", "n/a", "n/a"] in [row[:3] for row in page.rows("metric")]
    assert page.rows("class")[0][:3] == ["fox", "0", "n/a n/a"]
    assert "nan" not in page.text.lower()


def test_page_needs_nothing_but_itself(tmp_path):
    page = render(pictures=draw_pictures(tmp_path))
    assert len(page.images) == len(PICTURES)
    assert not set(page.tags) & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert [link for link in page.links if not link.startswith(("data:image/png;base64,", "#"))] == []
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert "@import" not in page.source
    targets = {link[1:] for link in page.links if link.startswith("#")}
    assert targets <= set(re.findall(r'id="([^"]+)"', page.source))


def test_every_picture_stands_in_its_place(tmp_path):
    page = render(pictures=draw_pictures(tmp_path))
    colors = []
    for image in page.images:
        data = base64.b64decode(image["src"].partition(",")[2])
        with Image.open(io.BytesIO(data)) as picture:
            colors.append(picture.getpixel((0, 0))[0] // 20)
            assert picture.size == (int(image["width"]), int(image["height"]))
    assert [PICTURES[number] for number in colors] == list(PICTURES)


def test_parts_that_are_missing_leave_no_trace(tmp_path):
    some = draw_pictures(
        tmp_path, [name for name in PICTURES if name not in ("feature_map", "corruptions", "mistakes")]
    )
    page = render(
        predictions=draw_predictions(["cat", "dog"], wrong=0),
        pictures=some,
        corruptions=None,
        slices=(),
        params={"evaluate.gradcam": False},
    )
    assert len(page.images) == len(PICTURES) - 3
    assert "Feature map" not in page.text
    assert "Grad-CAM" not in page.text
    assert "The most confident mistakes" not in page.text
    assert "The most frequent mistakes" not in page.text
    assert "The least certain" in page.text


def test_names_from_the_data_cannot_change_the_page():
    tame = render(names=("cat", "dog", "fox"), predictions=draw_predictions(("cat", "dog", "fox")))
    nasty = render(names=NASTY, predictions=draw_predictions(NASTY))
    assert nasty.tags == tame.tags
    assert {row[0] for row in nasty.rows("class")} == {NASTY[0], NASTY[1], "line\\nbreak\\u202e {{ 7*7 }}"}
    assert "\u202e" not in nasty.source
    facts = [make_content().facts | {"dataset": name} for name in ("<script>alert(1)</script>", "pets")]
    assert render(facts=facts[0]).tags == render(facts=facts[1]).tags


def noise(path: Path, side: int) -> Path:
    """A picture that no format makes small."""
    pixels = np.random.default_rng(5).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_a_picture_that_fits_is_taken_as_it_is(tmp_path):
    path = noise(tmp_path / "a.png", 64)
    embedded = embed_picture(path, path.stat().st_size)
    assert base64.b64decode(embedded.uri.removeprefix("data:image/png;base64,")) == path.read_bytes()
    assert (embedded.width, embedded.height) == (64, 64)


@pytest.mark.parametrize("limit", [80_000, 20_000, 10])
def test_a_picture_that_is_too_large_is_made_to_fit(tmp_path, limit):
    embedded = embed_picture(noise(tmp_path / "a.png", 300), limit)
    data = base64.b64decode(embedded.uri.removeprefix("data:image/jpeg;base64,"))
    assert len(data) <= limit or embedded.width == 1
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (embedded.width, embedded.height)
        assert abs(np.asarray(picture).mean() - 127) < 12


def test_page_stays_under_six_megabytes(tmp_path):
    large = noise(tmp_path / "large.png", 1300)
    assert large.stat().st_size > 5e6
    write_report(
        tmp_path / "report.html",
        make_content(BREEDS, predictions=draw_predictions(BREEDS, 2400), pictures=dict.fromkeys(PICTURES, large)),
    )
    assert (tmp_path / "report.html").stat().st_size < 6e6


def test_galleries_give_way_before_drawings(tmp_path):
    small, drawing, large = (noise(tmp_path / f"{side}.png", side) for side in (100, 560, 950))
    pictures = dict.fromkeys(PICTURES, small) | {"roc": drawing} | dict.fromkeys(["mistakes", "best"], large)
    kinds = {name: one.uri[11:15] for name, one in embed_pictures(pictures).items()}
    assert {name for name, kind in kinds.items() if kind == "jpeg"} == {"mistakes", "best"}
    fitting = dict.fromkeys(PICTURES, small)
    assert {one.uri[11:14] for one in embed_pictures(fitting).values()} == {"png"}


def test_a_broken_picture_leaves_no_page(tmp_path):
    bad = tmp_path / "roc.png"
    bad.write_bytes(b"no picture")
    with pytest.raises(OSError, match="cannot identify"):
        write_report(tmp_path / "report.html", make_content(pictures={"roc": bad}))
    with pytest.raises(OSError, match="absent"):
        write_report(tmp_path / "report.html", make_content(pictures={"roc": tmp_path / "absent.png"}))
    assert [path.name for path in tmp_path.iterdir()] == ["roc.png"]


SCRIPT = """
import sys; sys.path[:0] = [sys.argv[1]]
from pathlib import Path
import test_evaluation_page as t
t.write_both(Path(sys.argv[2]), Path(sys.argv[3]))
"""


def write_both(pictures: Path, folder: Path):
    """A page and a card with something in every section."""
    from catdog.model_card import write_model_card

    names = (*NASTY, *BREEDS)
    found = {name: pictures / f"{name}.png" for name in PICTURES}
    content = make_content(names, predictions=draw_predictions(names, 2400), pictures=found)
    write_report(folder / "report.html", content)
    write_model_card(folder / "model_card.md", content)


def test_same_content_gives_the_same_bytes_in_another_process(tmp_path):
    draw_pictures(tmp_path)
    noise(tmp_path / "mistakes.png", 700)
    write_both(tmp_path, tmp_path / "here")
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(here), str(tmp_path), str(tmp_path / "there")],
        check=True,
        env={
            "PYTHONHASHSEED": "77",
            "PYTHONPATH": str(here.parent / "src"),
            "PATH": "/usr/bin:/bin",
            "TZ": "Asia/Tokyo",
        },
    )
    for name in ("report.html", "model_card.md"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
        assert str(tmp_path) not in (tmp_path / "here" / name).read_text(encoding="utf-8")


def test_slices_of_properties_are_explained():
    page = render(slices=[("brightness", "below 90", 60, 1, False), ("own property", "x", 60, 1, False)])
    assert "brightness: mean grey of the picture" in page.text
    assert "sharpness" not in page.text


def test_slice_table_of_the_sample_is_as_the_stage_writes_it():
    from catdog.slices import COLUMNS

    assert set(slice_table(("aspect", "x", 60, 1, False)).columns) == set(COLUMNS)


# A test split of one class, as folders and split.file can give it: nothing can be ranked, and all the rest holds.


def judged_alone(names, label, wrong, images=40) -> LabelledPredictions:
    """Images of class `label` alone, of which the first `wrong` are called another class."""
    confidence = np.linspace(0.6, 0.99, images, dtype=np.float32)
    probabilities = np.repeat((1 - confidence)[:, np.newaxis] / (len(names) - 1), len(names), axis=1)
    predicted = np.where(np.arange(images) < wrong, (label + 1) % len(names), label)
    probabilities[np.arange(images), predicted] = confidence
    paths = tuple(f"test/{names[label]}/{number}.jpg" for number in range(images))
    return LabelledPredictions(paths, np.full(images, label), probabilities, names, 0.5)


@pytest.mark.parametrize(
    ("names", "label", "wrong"),
    [
        (("cat", "dog"), 0, 3),
        (("cat", "dog"), 1, 0),
        (("cat", "dog"), 1, 40),
        (("cat", "dog", "fox"), 0, 40),
        (("cat", "dog", "fox"), 0, 0),
        (("cat", "dog", "fox"), 1, 3),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_test_split_of_one_class_goes_all_the_way(tmp_path, names, label, wrong):
    judged = judged_alone(names, label, wrong)
    manifest = pd.DataFrame(
        {"path": judged.paths, "width": 30, "height": 20, "brightness": 9.0, "format": "JPEG", "group": range(40)}
    )
    blur = np.ones(40, np.float32)
    tables = evaluation_tables(judged, manifest, blur, temperature=1.5, resamples=50, seed=1)
    positions = np.arange(0, 40, 2)
    tables["features"] = feature_table(judged, positions, np.zeros((20, 2), np.float32))
    tables["corruptions"] = robustness_table(
        np.zeros((20, 8, 8, 3), np.uint8),
        positions,
        judged,
        lambda batches: np.full(sum(map(len, batches)), label),
        seed=1,
        batch_size=20,
    )
    pictures = draw_tables(tables, judged, tmp_path)
    dot = encode_jpeg(np.zeros((8, 8, 3), np.uint8), 95)
    for gallery in collect_galleries(
        judged, choose_galleries(judged, 4), lambda _: dot, make_content(names).info, None
    ):
        pictures |= draw_gallery(gallery, tmp_path)
    tables["predictions"] = prediction_table(judged)

    found = compute_metrics(judged)
    low, high = tables["metrics"].set_index("metric").loc["accuracy", ["low", "high"]]
    metrics = json.loads(json.dumps(found | {"accuracy_low": low, "accuracy_high": high, "test_images": 40}))
    assert (found["accuracy"], found["pr_auc"], "roc_auc" in found) == (1 - wrong / 40, 1, False)
    content = replace(make_content(names), tables=tables, metrics=metrics, pictures=pictures)
    page = Page(render_report(content))
    assert "n/a ROC AUC" in page.text
    absent = sorted(set(names) - {names[label]})
    assert f"Without a test image, so that nothing is known: {' and '.join(absent)}." in page.text
    assert [row[0] for row in page.rows("metric")] == [METRIC_NAMES[name][0] for name in found]
    assert "ROC AUC" not in render_model_card(content)

    # What `catdog compare` and the gate read of it.
    text = tables["predictions"].to_csv(index=False)
    one, other = (ComparedRun(name, {}, metrics, parse_predictions(text, name)) for name in ("one", "other"))
    comparison = compare([one, other], resamples=50)
    assert "roc_auc" not in comparison.metrics
    assert "roc_auc" not in format_text(comparison)
    candidate = Candidate(other, 0, 9_600_000, 20.0, ())
    policy = PromoteParams(min_accuracy=0, max_ece=1)
    assert failures(check(candidate, one, policy)) == []
    (failed,) = failures(check(candidate, one, policy.model_copy(update={"min_roc_auc": 0.9})))
    assert failed.sentence.startswith("no metric roc_auc is reported, at least 0.9 is asked; reported are accuracy")
