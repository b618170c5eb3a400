"""The model card: what a model is, what it was made from, what it can and cannot do, in one Markdown file.

Its sections are those of M. Mitchell and others, "Model cards for model reporting", 2019 (arXiv:1810.03993). It is
written from the same content as the report page; the layout is in `templates/model_card.md.jinja`.
"""

from __future__ import annotations

import re
from pathlib import Path

from catdog.backbones import get_backbones
from catdog.calibration import calibration_error
from catdog.files import write_text
from catdog.model import choose_output
from catdog.pages import printable
from catdog.paths import SPLITS
from catdog.report_content import (
    MEASURE_ROBUSTNESS,
    ReportContent,
    class_rows,
    confusion_rows,
    count_rows,
    findings,
    metric_range,
    metric_rows,
    metric_value,
    percent,
    points,
)
from catdog.slices import PROPERTIES

_SPECIAL = re.compile(r"([\\`*_\[\]<>#|~&$!])")


class Markdown(str):
    """Text that is Markdown already."""


def write_model_card(path: Path, content: ReportContent) -> None:
    """Writes the card, e.g. as reports/model_card.md; it appears whole or not at all."""
    write_text(path, render_model_card(content))


def escape_markdown(text: object) -> Markdown:
    """Makes GitHub's Markdown show text as it is, also in a table; what cannot be seen is shown as escapes."""
    return text if isinstance(text, Markdown) else Markdown(_SPECIAL.sub(r"\\\1", printable(text)))


def render_model_card(content: ReportContent) -> str:
    """Returns the card as GitHub's Markdown, with a line break at its end."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("catdog"),
        autoescape=False,  # which would be HTML's
        finalize=escape_markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["percent"] = percent
    environment.filters["code"] = lambda text: Markdown(f"`{text}`")
    found = findings(content)
    return environment.get_template("model_card.md.jinja").render(
        info=content.info,
        params=content.params,
        facts=content.facts,
        training=content.training,
        fine_tuning=content.training.get("fine_tuning"),
        fine_tuned=content.fine_tuned,
        hyperparameters=_hyperparameters(content),
        networks=[f"{one.builder} ({one.name})" for one in get_backbones(content.info.backbone)],
        head=_describe_head(content),
        output=_describe_output(content),
        chosen=_describe_calibration(content),
        weights=content.weights,
        model_megabytes=f"{content.model_bytes / 1e6:,.1f}",
        test_images=content.test_images,
        counts=count_rows(content),
        splits=SPLITS,
        metrics=metric_rows(content),
        classes=class_rows(content),
        confusions=confusion_rows(content, limit=5),
        slices=content.tables["slices"].to_dict("records"),
        properties=PROPERTIES,
        corruptions=[] if content.corruptions.empty else content.tables["corruptions"].to_dict("records"),
        ranged=lambda row: metric_range("accuracy", row["low"], row["high"]),
        points=points,
        error_before=percent(calibration_error(content.tables["calibration"], "before")),
        error_after=metric_value("ece", content.metrics["ece"]),
        facts_found=[one for one in found if one.kind != "check"],
        doubts=[one for one in found if one.kind == "check"],
        measure_robustness=MEASURE_ROBUSTNESS,
    )


def _describe_head(content: ReportContent) -> str:
    """Says what stands between the features and the logits."""
    params = content.params.train
    layers = [f"{size:,} units ({params.activation})" for size in params.hidden_units]
    units = _outputs(content)
    layers.append(f"{units:,} logit{'s' if units > 1 else ''}")
    dropout = f", dropout {params.dropout:g} before the last layer" if params.dropout else ""
    if params.dropout and params.hidden_units:
        dropout = f", dropout {params.dropout:g} after each hidden layer"
    return f"dense layers: {', '.join(layers)}{dropout}"


def _describe_output(content: ReportContent) -> str:
    names = content.info.class_names
    if _outputs(content) == 1:
        return f"one probability, that of {names[1]} (sigmoid)"
    return f"{len(names):,} probabilities, one a class, in the order of the classes under Intended use (softmax)"


def _describe_calibration(content: ReportContent) -> str:
    """Says what else the validation split chose beside the epoch."""
    params = content.params.calibrate
    also = ["the temperature"] if params.temperature else []
    if isinstance(params.threshold, str):
        target = f" of {percent(params.target)}" if params.threshold in ("precision", "recall") else ""
        also.append(f"the threshold (by {params.threshold}{target})")
    return "".join(f", {one}" for one in also[:-1]) + "".join(f" and {one}" for one in also[-1:])


def _outputs(content: ReportContent) -> int:
    classes = len(content.info.class_names)
    return 1 if choose_output(content.params.train.output, classes) == "sigmoid" else classes


def _hyperparameters(content: ReportContent) -> dict[str, str]:
    """The parameters that decided about the weights, by dotted name; of what was not used, nothing."""
    params = content.params
    blocks = ["train", "calibrate"]
    if params.fine_tune.layers != "none":
        blocks.append("fine_tune")
    if params.augment.views or (params.fine_tune.layers != "none" and params.fine_tune.augment):
        blocks.append("augment")
    chosen = {name: value for name, value in params.flat().items() if name.partition(".")[0] in blocks}
    return {"seed": str(params.seed)} | chosen
