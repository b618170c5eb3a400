"""params.yaml: the defaults load, and every mistake is told in one sentence that names the key."""

import copy
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from catdog.config import Params, load_params, validate_params
from catdog.errors import CatdogError

ROOT = Path(__file__).parents[1]
DEFAULTS = ROOT / "params.yaml"


def tree() -> dict:
    return YAML(typ="safe").load(DEFAULTS.read_text(encoding="utf-8"))


def changed(name: str, value: object) -> dict:
    """The defaults with one value, by its dotted name, replaced or added."""
    result = copy.deepcopy(tree())
    *blocks, key = name.split(".")
    place = result
    for block in blocks:
        place = place[block]
    place[key] = value
    return result


def message(values: dict) -> str:
    with pytest.raises(CatdogError) as caught:
        validate_params(values, source="params.yaml")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("params.yaml: ")
    return str(caught.value)


def load_text(folder: Path, text: str) -> Params:
    path = folder / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return load_params(path)


def dotted(values: dict, prefix: str = "") -> dict:
    names = {}
    for key, value in values.items():
        names |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return names


def test_shipped_defaults_load_with_the_values_of_the_file():
    params = load_params(DEFAULTS)
    assert params.seed == 20
    assert params.dataset == "sample"
    assert params.backbone == "mobilenetv2"
    assert params.split.val == 0.15
    assert params.preprocess.image_size == 224
    assert params.train.hidden_units == ()
    assert params.evaluate.gallery == 24


def test_defaults_in_the_code_are_those_of_the_file():
    empty_blocks = {name: {} for name, value in tree().items() if isinstance(value, dict)}
    assert validate_params(empty_blocks) == load_params(DEFAULTS)


def test_file_names_every_parameter_that_the_code_knows():
    known = {}
    for name, field in Params.model_fields.items():
        block = getattr(field.annotation, "model_fields", None)
        known |= {f"{name}.{key}": 1 for key in block} if block else {name: 1}
    assert dotted(tree()).keys() == known.keys()


def test_every_value_of_the_file_has_a_comment():
    lines = DEFAULTS.read_text(encoding="utf-8").splitlines()
    keys = [(number, line) for number, line in enumerate(lines) if re.match(r" *\w+: *[^ #]", line)]
    assert len(keys) == len(dotted(tree()))
    bare = [
        line.strip()
        for number, line in enumerate(lines)
        if (number, line) in keys
        and not re.search(r" # \S", line)
        and not re.match(r" +# \S", (lines[number + 1 :] or [""])[0])
    ]
    assert bare == []


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sede", "did you mean seed?"),
        ("back_bone", "did you mean backbone?"),
        ("train.learnin_rate", "did you mean learning_rate?"),
        ("split.tets", "did you mean test?"),
        ("preprocess.jpg_quality", "did you mean jpeg_quality?"),
    ],
)
def test_unknown_key_is_named_with_the_nearest_one(name, hint):
    told = message(changed(name, 1))
    assert f"unknown parameter {name}; {hint}" in told


def test_unknown_key_without_a_near_one_lists_what_there_is():
    told = message(changed("embed.xyzzy", 1))
    assert "embed.xyzzy" in told
    assert "pooling, engine, batch_size" in told


def test_all_mistakes_are_told_at_once():
    values = changed("train.epochs", 0)
    values["split"]["vall"] = 3
    told = message(values)
    assert "train.epochs" in told
    assert "split.vall" in told


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", "10"),
        ("seed", True),
        ("seed", None),
        ("dataset", 3),
        ("backbone", ["vgg16"]),
        ("train.epochs", "10"),
        ("train.epochs", True),
        ("train.epochs", 2.5),
        ("train.learning_rate", "0.1"),
        ("train.learning_rate", True),
        ("train.hidden_units", 64),
        ("train.hidden_units", "64"),
        ("train.hidden_units", [64.0]),
        ("train.hidden_units", ["64"]),
        ("split.val", "0.2"),
        ("split.val", True),
        ("split.val", [0.2]),
        ("split.max_rejected", None),
        ("preprocess.image_size", 224.0),
        ("preprocess", 224),
        ("embed", None),
        ("embed", []),
    ],
)
def test_wrong_type_is_refused_by_name(name, value):
    told = message(changed(name, value))
    assert f"{name} = " in told or f"{name}.0 = " in told
    assert repr(value) in told or repr(value[0]) in told


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 2**32),
        ("dataset", ""),
        ("weights", ""),
        ("download.sample_images", 0),
        ("download.sample_images", 7),
        ("split.val", 0),
        ("split.val", 0.0),
        ("split.test", -0.1),
        ("split.test", 1.0),
        ("split.test", 1.5),
        ("split.near_duplicate_bits", -2),
        ("split.near_duplicate_bits", 17),
        ("split.max_rejected", 1.1),
        ("split.max_megapixels", 0),
        ("preprocess.image_size", 31),
        ("preprocess.resize", "squash"),
        ("preprocess.jpeg_quality", 0),
        ("preprocess.jpeg_quality", 101),
        ("preprocess.shard_megabytes", 0),
        ("embed.pooling", "mean"),
        ("embed.engine", "torch"),
        ("embed.batch_size", 0),
        ("train.hidden_units", [64, 0]),
        ("train.activation", "softmax"),
        ("train.dropout", 1),
        ("train.dropout", -0.1),
        ("train.output", "linear"),
        ("train.optimizer", "lion"),
        ("train.learning_rate", 0),
        ("train.learning_rate", float("nan")),
        ("train.learning_rate", float("inf")),
        ("train.l2", -1),
        ("train.epochs", 0),
        ("train.patience", 0),
        ("calibrate.threshold", 0.0),
        ("calibrate.threshold", 1.0),
        ("calibrate.threshold", "f2"),
        ("calibrate.threshold", True),
        ("calibrate.target", 0),
        ("evaluate.gallery", 0),
    ],
)
def test_impossible_value_is_refused_by_name(name, value):
    assert f"{name}" in message(changed(name, value))


def test_number_of_a_fold_is_below_the_number_of_folds():
    assert "split.fold = 5: must be below split.folds = 5; the first fold is 0" in message(changed("split.fold", 5))
    values = changed("split.folds", 1)
    for fold in (0, 1000):
        values["split"]["fold"] = fold
        told = message(values)
        assert "split.folds = 1: " in told and "split.fold = " not in told


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        *(
            (
                "fine_tune.layers",
                value,
                "must be none, a number of layers from the top, the name of the first layer, last_block, or all",
            )
            for value in (0, -3, True, 2.0, "", None)
        ),
        ("split.train", float("inf"), "must be rest, a fraction below 1, or a whole number of images"),
        ("train.warmup", 101, "must be at least the warmup of 101 epochs"),
        ("fine_tune.warmup", 11, "must be at least the warmup of 11 epochs"),
    ],
)
def test_what_is_allowed_is_told_once(name, value, told):
    values = changed(name, value)
    if name.endswith("warmup"):
        name = name.replace("warmup", "epochs")
        value = values[name.partition(".")[0]]["epochs"]
    assert message(values) == f"params.yaml: {name} = {value!r}: {told}"


def test_warmup_is_compared_with_epochs_that_are_not_given():
    values = changed("train.warmup", 101)
    del values["train"]["epochs"]
    assert message(values) == "params.yaml: train.epochs = 100: must be at least the warmup of 101 epochs"
    assert validate_params(changed("train.warmup", 100)).train.warmup == 100


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("split.val", 40),
        ("split.test", 0.999),
        ("split.near_duplicate_bits", -1),
        ("split.max_rejected", 0),
        ("train.dropout", 0),
        ("train.learning_rate", 1),
        ("train.l2", 0),
    ],
)
def test_bounds_and_whole_numbers_are_accepted(name, value):
    block, key = name.split(".")
    assert getattr(getattr(validate_params(changed(name, value)), block), key) == value


def test_number_in_the_form_that_dvc_writes_is_a_number(tmp_path):
    text = DEFAULTS.read_text(encoding="utf-8")
    for written, meant in (("1e-05", 1e-5), ("1E-4", 1e-4), ("5e-1", 0.5)):
        replaced = text.replace("learning_rate: 0.001", f"learning_rate: {written}")
        assert replaced != text
        assert load_text(tmp_path, replaced).train.learning_rate == meant


def test_missing_block_is_named():
    values = tree()
    del values["embed"]
    assert message(values) == "params.yaml: parameter embed is missing"


@pytest.mark.parametrize("text", ["seed: [1, 2", "a: b: c", "\tseed: 1", "seed: 1\nseed: 2\n"])
def test_no_yaml_is_one_sentence(tmp_path, text):
    with pytest.raises(CatdogError, match=r"params\.yaml is not valid YAML: ") as caught:
        load_text(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_no_yaml(tmp_path):
    (tmp_path / "params.yaml").write_bytes(b"seed: \xff\xfe")
    with pytest.raises(CatdogError, match="not valid YAML"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("text", ["", "# only a comment\n", "- 1\n- 2\n", "seed"])
def test_yaml_without_parameters_is_refused(tmp_path, text):
    with pytest.raises(CatdogError, match="holds no parameters"):
        load_text(tmp_path, text)


def test_missing_file_says_where_to_run(tmp_path):
    with pytest.raises(CatdogError, match="does not exist; run from the repository root"):
        load_params(tmp_path / "params.yaml")


def test_keys_that_are_no_text_are_refused():
    with pytest.raises(CatdogError, match="7"):
        validate_params({**tree(), 7: 1})


def test_unknown_backbone_is_named_with_the_nearest_one():
    with pytest.raises(CatdogError, match=r"no backbone 'vgg-16': did you mean 'vgg16'\?"):
        validate_params(changed("backbone", "vgg-16"))


def test_image_too_small_for_the_backbone_names_the_least_size():
    values = changed("backbone", "inceptionv3")
    values["preprocess"]["image_size"] = 74
    assert re.search(r"preprocess\.image_size = 74 .*inceptionv3.* 75$", message(values))
    values["preprocess"]["image_size"] = 75
    assert validate_params(values).preprocess.image_size == 75


def test_lists_become_tuples_and_nothing_can_be_changed():
    params = validate_params(changed("train.hidden_units", [64, 8]))
    assert params.train.hidden_units == (64, 8)
    hash(params)
    for part, key in ((params, "seed"), (params.train, "epochs")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(part, key, 1)


def test_validation_leaves_its_input_alone():
    values = tree()
    validate_params(values)
    assert values == tree()


def test_flat_names_are_those_of_the_file_and_values_are_text():
    flat = validate_params(changed("train.hidden_units", [64, 8])).flat()
    assert flat.keys() == dotted(tree()).keys()
    assert flat["train.hidden_units"] == "[64, 8]"
    assert flat["seed"] == "20"
    assert flat["train.l2"] == "0.0"
    assert flat["backbone"] == "mobilenetv2"
    assert load_params(DEFAULTS).flat()["train.hidden_units"] == "[]"
