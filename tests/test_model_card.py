"""The model card: it says what is so, in Markdown that shows it, and its code runs."""

import contextlib
import io
import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image

from catdog.model_card import escape_markdown, render_model_card, write_model_card
from catdog.report_content import describe_weights, findings
from sample_report import SHIPPED, draw_predictions, make_content

SECTIONS = [
    "Model details", "Intended use", "Factors", "Metrics", "Evaluation data", "Training data", "Quantitative analyses",
    "Ethical considerations", "Caveats and recommendations", "How to use", "Reproduce",
]  # fmt: skip
NASTY = (
    "a|b", "<b>bold</b>", "`code` ``", "*star* _line_ ~~gone~~", "[link](x)", "back\\slash\\", "# head",
    "&lt; $x$", "new\n\n# line",
)  # fmt: skip


def html(text: str) -> str:
    """The card as GitHub shows it: CommonMark with tables."""
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)


def tables(text: str) -> list[list[list[str]]]:
    """The tables of the card, as rows of cells in plain text."""
    return [
        [
            [
                unescape(re.sub(r"<(code|strong|/code|/strong)>", "", cell))
                for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)
            ]
            for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        ]
        for table in re.findall(r"<table>(.*?)</table>", html(text), re.DOTALL)
    ]


def rows(text: str, heading: str) -> list[list[str]]:
    """The rows of the table whose first column has this heading."""
    (found,) = [table for table in tables(text) if table[0][0] == heading]
    return found[1:]


def facts(text: str) -> dict[str, str]:
    """What the tables of two columns without a heading say."""
    return {row[0]: row[1] for table in tables(text) if table[0] == ["", ""] for row in table[1:]}


def card(**changes) -> str:
    return render_model_card(make_content(**changes))


def bullets(text: str, section: str) -> list[str]:
    """The list of a section, in plain text."""
    part = html(text).split(f"<h2>{section}</h2>")[1].split("<h2>")[0]
    return [unescape(re.sub(r"<[^>]+>", "", one)).strip() for one in re.findall(r"<li>(.*?)</li>", part, re.DOTALL)]


def test_sections_are_those_of_the_paper():
    assert re.findall(r"^## (.*)$", card(), re.MULTILINE) == SECTIONS
    assert "arXiv:1810.03993" in card()


@pytest.mark.parametrize("classes", [2, 37])
def test_every_table_is_one(classes):
    names = tuple(f"american_pit_bull_terrier_{number}" for number in range(classes))
    text = card(names=names, predictions=draw_predictions(names, 2400))
    found = tables(text)
    assert len(found) == 10
    for table in found:
        assert {len(row) for row in table} == {len(table[0])}
    assert "|" not in re.sub(r"<pre>.*?</pre>", "", html(text), flags=re.DOTALL)
    assert "\n\n\n" not in text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_numbers_are_those_of_the_tables():
    text = card()
    assert rows(text, "metric")[0][:3] == ["accuracy", "95.8 %", "92.5 % to 97.7 %"]
    assert rows(text, "class")[0][:4] == ["cat", "120", "95.8 %", "90.6 % to 98.2 %"]
    assert rows(text, "property")[0] == [
        "shorter side",
        "below 300 px",
        "62",
        "9",
        "85.5 %",
        "74.7 % to 92.2 %",
        "weak",
    ]
    assert [row[-1] for row in rows(text, "property")] == ["weak", "", "", ""]
    assert rows(text, "corruption")[0] == ["none", "", "96.0 %", "93.9 % to 97.4 %", ""]
    assert rows(text, "corruption")[3] == ["Gaussian noise", "5", "62.0 %", "57.7 % to 66.1 %", "34.0 points"]
    assert rows(text, "images of class") == [
        ["cat", "200", "40", "60"],
        ["dog", "200", "40", "60"],
        ["all", "400", "80", "120"],
    ]
    assert rows(text, "network") == [
        ["mobilenetv2", "Apache-2.0", describe_weights("mobilenetv2", "imagenet", "")[0]["source"], SHIPPED]
    ]
    assert facts(text)["hash"] == "md5: 994ce4e41f9fe459bac489ac137f4312"
    assert facts(text)["files rejected"] == "3 (3: not an image)"
    assert "1,000 bootstrap resamples" in text


def test_findings_stand_in_full_each_in_its_section():
    content = make_content()
    text = render_model_card(content)
    for one in findings(content):
        section = "Caveats and recommendations" if one.kind == "check" else "Quantitative analyses"
        assert f"{one.text} {one.command}".strip() in bullets(text, section)


def test_model_is_described_as_it_is():
    found = facts(card())
    assert found["head"] == "dense layers: 1 logit, dropout 0.5 before the last layer"
    assert found["output"].startswith("one probability, that of dog (sigmoid)")
    assert found["decision"] == "dog from a probability of 0.5 on, else cat"
    assert "frozen" in found["backbone"]
    assert found["size"] == "9.6 MB, 2,259,265 parameters, of which the head has 1,281"
    found = facts(card(params={"train.hidden_units": (256, 64), "train.output": "softmax"}))
    assert (
        found["head"]
        == "dense layers: 256 units (relu), 64 units (relu), 2 logits, dropout 0.5 after each hidden layer"
    )
    assert "softmax" in found["output"]
    found = facts(card(names=("a", "b", "c")))
    assert found["output"].startswith("3 probabilities")
    assert found["decision"] == "the most probable class"


@pytest.mark.parametrize("kept", ["yes", "no: the frozen model is better"])
def test_fine_tuning_is_told_and_whether_it_was_kept(kept):
    training = make_content().training | {"fine_tuning": {"kept": kept, "from_layer": "block_13_expand", "epochs": 7}}
    text = card(training=training, params={"fine_tune.layers": "last_block"})
    assert ("fine-tuned from block_13_expand" in facts(text)["backbone"]) == (kept == "yes")
    assert f"over 7 epochs was kept: {kept}." in unescape(html(text))
    assert "fine_tune.learning_rate" in [row[0] for row in rows(text, "parameter")]


def test_hyperparameters_are_those_that_were_used():
    names = [row[0] for row in rows(card(), "parameter")]
    assert "train.dropout" in names
    assert not [name for name in names if name.startswith(("augment.", "fine_tune.", "evaluate.", "runtime."))]
    assert "augment.rotation" in [row[0] for row in rows(card(params={"augment.views": 2}), "parameter")]


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "chose the epoch and the temperature."),
        ({"calibrate.temperature": False}, "chose the epoch."),
        (
            {"calibrate.threshold": "recall"},
            "chose the epoch, the temperature and the threshold (by recall of 95.0 %).",
        ),
        ({"calibrate.threshold": "f1", "calibrate.temperature": False}, "chose the epoch and the threshold (by f1)."),
    ],
)
def test_what_validation_chose_is_told(changes, chosen):
    assert chosen in card(params=changes)


def test_caveats_follow_from_the_weights_and_from_what_was_not_measured():
    published, own, random = (
        card(
            info=replace(make_content().info, weights=weights), weights=describe_weights("mobilenetv2", weights, "none")
        )
        for weights in ("imagenet", "mine.h5", "random")
    )
    assert "ImageNet itself is offered" in published
    assert "ImageNet" not in own
    assert [
        one
        for one in bullets(own, "Caveats and recommendations")
        if one.startswith("The licence of the weights of mobilenetv2")
    ]
    assert [one for one in bullets(random, "Caveats and recommendations") if "random weights" in one]
    assert "is not known; see Robustness" not in published
    unmeasured = card(corruptions=None)
    assert "is not known; see Robustness" in unmeasured
    assert "Not measured: `dvc exp run -S evaluate.corruptions=500`" in unmeasured
    assert "Near-duplicates were not looked for." in card(params={"split.near_duplicate_bits": -1})


def test_names_from_the_data_are_shown_as_they_are():
    text = card(names=NASTY, predictions=draw_predictions(NASTY, 900, wrong=0.2))
    shown = {name.replace("\n", "\\n") for name in NASTY}
    assert {row[0] for row in rows(text, "class")} == shown
    assert {row[0] for row in rows(text, "images of class")} == shown | {"all"}
    assert {name for row in rows(text, "true class") for name in row[:2]} <= shown
    assert re.findall(r"<h2>(.*?)</h2>", html(text)) == SECTIONS
    assert not re.search(r"<(b|em|a|s|del)\b", html(text))


@pytest.mark.parametrize("text", [*NASTY[:-1], "1. a", "a & b"])
def test_escaped_text_reads_as_before(text):
    assert html(f"x {escape_markdown(text)} x").strip() == f"<p>x {html_text(text)} x</p>"


def html_text(text: str) -> str:
    """Text as HTML writes it."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def test_card_is_written_whole(tmp_path):
    write_model_card(tmp_path / "reports" / "model_card.md", make_content())
    assert (tmp_path / "reports" / "model_card.md").read_text(encoding="utf-8") == card()


@pytest.mark.parametrize("output", ["sigmoid", "softmax"])
def test_the_code_of_the_card_classifies_a_picture(tmp_path, monkeypatch, output):
    import keras

    from catdog.model import ModelInfo, save_model

    # Redness decides: 0.5 + half of what red is above the mean of all.
    pixels = keras.Input((32, 32, 3))
    mean = keras.layers.GlobalAveragePooling2D()(pixels)
    kernel = np.array([[0.04], [-0.02], [-0.02]], np.float32)
    if output == "softmax":
        kernel = np.concatenate([-kernel, np.zeros_like(kernel), kernel], axis=1)
    logits = keras.layers.Dense(kernel.shape[1], output, use_bias=False)
    model = keras.Model(pixels, logits(mean))
    logits.set_weights([kernel])
    names = ("blue", "red") if output == "sigmoid" else ("blue", "grey", "red")
    save_model(
        model, ModelInfo(names, 32, "crop", 95, "mobilenetv2", "random", "avg", 0.7), tmp_path / "models/model.keras"
    )

    text = card(info=replace(make_content().info, resize="crop"))
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    answers = []
    # The sides, of another colour, do not count: the centre is cut out.
    for color in ((200, 90, 90), (90, 90, 200), (140, 120, 120)):
        picture = Image.new("RGB", (90, 40), (0, 255, 255))
        picture.paste(color, (20, 0, 70, 40))
        picture.save(tmp_path / "photo.jpg", quality=98, subsampling=0)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "model_card.md", "exec"), {})
        answers.append(printed.getvalue().split())
    if output == "sigmoid":
        # 0.04 * 140 - 0.02 * 240 = 0.8, a probability of 69 %: below the threshold of 70 %.
        assert [name for name, _ in answers] == ["red", "blue", "blue"]
        assert float(answers[0][1].rstrip("%")) == pytest.approx(100 / (1 + np.exp(-4.4)), abs=0.5)
        assert float(answers[2][1].rstrip("%")) == pytest.approx(100 / (1 + np.exp(0.8)), abs=1)
    else:
        assert [name for name, _ in answers] == ["red", "blue", "red"]
