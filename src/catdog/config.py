"""params.yaml as one frozen, validated object."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from catdog.backbones import get_backbones
from catdog.errors import CatdogError
from catdog.files import parse_yaml

THRESHOLD_RULES = ("f1", "youden", "precision", "recall")
"""How the threshold may be chosen on the validation split; see `calibration.choose_threshold`."""


def _list_to_tuple(value: object) -> object:
    """Lets a YAML list fill a tuple: strict mode would refuse it, and a frozen object needs the tuple."""
    return tuple(value) if isinstance(value, list) else value


class _Block(BaseModel):
    """Frozen, without unknown keys, and strict: `epochs: "10"` is a mistake, not a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DownloadParams(_Block):
    """How the data set is brought in."""

    sample_images: int = Field(600, ge=2, le=1_000_000, multiple_of=2)
    sha256: str = Field("", pattern="^([0-9a-fA-F]{64})?$")


Share = Annotated[int | float, Field(gt=0)]


def _share_or_rest(value: object) -> object:
    """Refuses everything else itself: pydantic would tell it once for each type of the union."""
    if value != "rest" and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf):
        raise ValueError("must be rest, a fraction below 1, or a whole number of images")
    return value


class SplitParams(_Block):
    """What is accepted and how it is split."""

    method: Literal["auto", "random", "given", "folds"] = "auto"
    train: Annotated[int | float | Literal["rest"], BeforeValidator(_share_or_rest)] = "rest"
    val: Share = 0.15
    test: Share = 0.2
    file: str = ""
    folds: int = Field(5, ge=2, le=1000)
    fold: int = Field(0, ge=0)
    exclude: str = ""
    near_duplicate_bits: int = Field(4, ge=-1, le=16)
    max_rejected: float = Field(0.05, ge=0, le=1)
    max_megapixels: float = Field(80, gt=0, le=178)  # Pillow refuses more on its own

    @field_validator("train", "val", "test")
    @classmethod
    def _fraction_or_count(cls, value: int | float | str) -> int | float | str:
        if isinstance(value, float) and value >= 1:
            raise ValueError("must be a fraction below 1 or a whole number of images")
        return value

    @field_validator("fold")
    @classmethod
    def _one_of_the_folds(cls, value: int, info: ValidationInfo) -> int:
        folds = info.data.get("folds")  # absent where it is wrong itself, which is told
        if folds is not None and value >= folds:
            raise ValueError(f"must be below split.folds = {folds}; the first fold is 0")
        return value


class PreprocessParams(_Block):
    """What a stored picture looks like."""

    image_size: int = Field(224, ge=32, le=1024)
    resize: Literal["stretch", "crop", "pad"] = "stretch"
    jpeg_quality: int = Field(95, ge=1, le=100)
    shard_megabytes: float = Field(8, gt=0, le=10_000)


class EmbedParams(_Block):
    """How a picture becomes a feature vector."""

    pooling: Literal["avg", "max", "flatten"] = "avg"
    engine: Literal["auto", "openvino", "keras"] = "auto"
    batch_size: int = Field(8, ge=1, le=4096)


def _no_shorter_than_the_warmup(epochs: int, info: ValidationInfo) -> int:
    warmup = info.data.get("warmup", 0)
    if warmup > epochs:
        raise ValueError(f"must be at least the warmup of {warmup} epochs")
    return epochs


class TrainParams(_Block):
    """The head and how it is fitted."""

    hidden_units: Annotated[tuple[Annotated[int, Field(ge=1, le=65_536)], ...], BeforeValidator(_list_to_tuple)] = ()
    activation: Literal["relu", "gelu", "elu", "selu", "silu", "tanh"] = "relu"
    dropout: float = Field(0.5, ge=0, lt=1)
    output: Literal["auto", "sigmoid", "softmax"] = "auto"
    optimizer: Literal["adam", "adamw", "rmsprop", "sgd", "momentum"] = "adam"
    learning_rate: float = Field(0.001, gt=0, le=10)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = Field(0, ge=0)
    l2: float = Field(0.0, ge=0)
    loss: Literal["crossentropy", "focal"] = "crossentropy"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)
    class_weights: Literal["none", "balanced"] = "none"
    clip_norm: float = Field(0.0, ge=0)
    ema: float = Field(0.0, ge=0, lt=1)
    batch_size: int = Field(64, ge=1, le=65_536)
    epochs: int = Field(100, ge=1, le=100_000, validate_default=True)
    patience: int = Field(10, ge=1)

    _warms_up_in_time = field_validator("epochs")(_no_shorter_than_the_warmup)


class AugmentParams(_Block):
    """How training images are varied."""

    views: int = Field(0, ge=0, le=100)
    flip: Literal["none", "horizontal", "vertical", "both"] = "horizontal"
    rotation: float = Field(0.03, ge=0, le=0.5)
    zoom: float = Field(0.1, ge=0, lt=1)
    shear: float = Field(0.0, ge=0, le=1)
    translation: float = Field(0.05, ge=0, lt=1)
    brightness: float = Field(0.1, ge=0, le=1)
    contrast: float = Field(0.1, ge=0, lt=1)
    saturation: float = Field(0.1, ge=0, lt=1)
    randaugment: int = Field(0, ge=0, le=20)
    magnitude: float = Field(0.3, ge=0, le=1)


def _check_layers(value: object) -> int | str:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError("must be none, a number of layers from the top, the name of the first layer, last_block, or all")


class FineTuneParams(_Block):
    """How the top of the backbone is trained after the head."""

    layers: Annotated[int | str, PlainValidator(_check_layers)] = "none"
    learning_rate: float = Field(0.00001, gt=0, le=10)
    warmup: int = Field(1, ge=0)
    batch_size: int = Field(32, ge=1, le=65_536)
    epochs: int = Field(10, ge=1, le=100_000, validate_default=True)
    patience: int = Field(3, ge=1)
    cutmix: float = Field(0.0, ge=0)
    augment: bool = True

    _warms_up_in_time = field_validator("epochs")(_no_shorter_than_the_warmup)


class RuntimeParams(_Block):
    """How the device computes."""

    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = "auto"
    xla: Literal["auto", "always", "never"] = "auto"


def _check_threshold(value: object) -> float | str:
    if isinstance(value, float) and 0 < value < 1:
        return value
    if isinstance(value, str) and value in THRESHOLD_RULES:
        return value
    raise ValueError(f"it must be a number between 0 and 1, or {', '.join(THRESHOLD_RULES)}")


class CalibrateParams(_Block):
    """What is fitted on the validation split after training and stored in the model."""

    temperature: bool = True
    threshold: Annotated[float | str, PlainValidator(_check_threshold)] = 0.5
    target: float = Field(0.95, gt=0, le=1)


class EvaluateParams(_Block):
    """How the test split is judged and shown."""

    gallery: int = Field(24, ge=1, le=400)
    resamples: int = Field(1000, ge=100, le=100_000)
    gradcam: bool = True
    feature_map: Literal["tsne", "pca", "none"] = "tsne"
    corruptions: int = Field(0, ge=0)


MOST_HIDDEN_LAYERS = 8


def parse_range(text: str) -> tuple[float, float]:
    """Returns the two ends of a range of `tune`, such as "0.0001..0.1"; raises ValueError where it is none."""
    low, dots, high = text.partition("..")
    if not dots:
        raise ValueError(text)
    return float(low), float(high)


def _candidates(name: str) -> BeforeValidator:
    """Builds the check of what a search may try: a list of values, or a numeric range as "from..to".

    Each value, and each end of a range, must be one that `train` takes.
    """

    def check(value: object) -> str | tuple[Any, ...]:
        if isinstance(value, list | tuple) and value:
            values = tuple(value)
        elif isinstance(value, str) and name != "optimizer":
            values = _ends(name, value)
        else:
            kinds = "a list of values" if name == "optimizer" else "a list of values, or a range such as 1..3"
            raise ValueError(f"must be {kinds}")
        for number, candidate in enumerate(values):
            _check_candidate(name, candidate)
            if isinstance(value, list | tuple) and candidate in values[:number]:
                raise ValueError(f"holds {candidate} twice")
        if isinstance(value, str):
            return value
        return tuple(map(float, values)) if name in ("learning_rate", "dropout") else values

    return BeforeValidator(check)


def _ends(name: str, text: str) -> tuple[Any, ...]:
    try:
        ends: tuple[Any, ...] = parse_range(text)
        if name.startswith("hidden"):
            ends = tuple(int(part) for part in text.split(".."))
    except ValueError:
        raise ValueError("must be a list of values, or a range such as 1..3") from None
    if ends[0] > ends[1]:
        raise ValueError("must go from the lower end to the higher")
    return ends


def _check_candidate(name: str, value: object) -> None:
    if name == "hidden_layers":
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_HIDDEN_LAYERS:
            raise ValueError(f"may hold whole numbers from 0 to {MOST_HIDDEN_LAYERS}, not {value!r}")
        return
    try:
        TrainParams.model_validate({name: (value,) if name == "hidden_units" else value})
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise ValueError(f"holds {value!r}: {message[0].lower()}{message[1:]}") from None


class TuneParams(_Block):
    """What `catdog tune` tries, and how it chooses."""

    method: Literal["random", "hyperband", "bayesian"] = "hyperband"
    trials: int = Field(70, ge=1, le=10_000)
    epochs: int = Field(30, ge=1, le=100_000)
    patience: int = Field(3, ge=1)
    learning_rate: Annotated[str | tuple[float, ...], _candidates("learning_rate")] = "0.0001..0.1"
    optimizer: Annotated[tuple[str, ...], _candidates("optimizer")] = ("adam", "adamw", "momentum")
    hidden_layers: Annotated[str | tuple[int, ...], _candidates("hidden_layers")] = (0, 1, 2)
    hidden_units: Annotated[str | tuple[int, ...], _candidates("hidden_units")] = (64, 128, 256)
    dropout: Annotated[str | tuple[float, ...], _candidates("dropout")] = "0.0..0.7"


class PromoteParams(_Block):
    """What `catdog promote` asks of a model; 0 asks nothing, but of the calibration error."""

    min_accuracy: float = Field(default=0.8, ge=0, le=1)
    min_balanced_accuracy: float = Field(default=0.0, ge=0, le=1)
    min_precision: float = Field(default=0.0, ge=0, le=1)
    min_recall: float = Field(default=0.0, ge=0, le=1)
    min_f1: float = Field(default=0.0, ge=0, le=1)
    min_roc_auc: float = Field(default=0.0, ge=0, le=1)
    min_pr_auc: float = Field(default=0.0, ge=0, le=1)
    max_ece: float = Field(default=0.1, ge=0, le=1)
    max_megabytes: float = Field(default=0.0, ge=0)
    max_latency_ms: float = Field(default=0.0, ge=0)


class TrackingParams(_Block):
    """How the pipeline depends on MLflow."""

    required: bool = True


class Params(_Block):
    """All of params.yaml."""

    seed: int = Field(20, ge=0, lt=2**32)
    dataset: str = Field("sample", min_length=1)
    backbone: str = "mobilenetv2"
    weights: str = Field("imagenet", min_length=1)
    compute: Literal["local", "ray"] = "local"
    download: DownloadParams
    split: SplitParams
    preprocess: PreprocessParams
    augment: AugmentParams
    embed: EmbedParams
    train: TrainParams
    fine_tune: FineTuneParams
    calibrate: CalibrateParams
    runtime: RuntimeParams
    evaluate: EvaluateParams
    tune: TuneParams
    promote: PromoteParams = PromoteParams()
    tracking: TrackingParams = TrackingParams()

    def flat(self) -> dict[str, str]:
        """Returns every parameter by its dotted name, as text, as MLflow and `-S` name them."""
        return dict(flatten(self.model_dump()))


def flatten(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the dotted names of a tree's values, and the values as text, as MLflow and `-S` name them."""
    for names, value in leaves(tree):
        if not isinstance(value, Mapping):  # an empty block sets nothing
            yield ".".join(names), str(list(value) if isinstance(value, tuple) else value)


def leaves(tree: Mapping[str, Any], block: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the values of a tree, each after the names that lead to it; an empty block is a value."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*block, name))
        else:
            yield (*block, name), value


def load_params(path: Path) -> Params:
    """Reads and validates a params.yaml.

    Raises:
        CatdogError: the file is missing or no YAML, a key is unknown or missing, a value has the wrong
            type or is impossible, or the backbone does not exist or cannot take the image size. The
            message names every key, its value and what is allowed.
    """
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise CatdogError(f"{path} does not exist; run from the repository root") from None
    except UnicodeDecodeError as error:
        raise CatdogError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise CatdogError(f"{path} holds no parameters; `git checkout {path.name}` brings the defaults back")
    return validate_params(tree, source=path.name)


def validate_params(tree: Mapping[str, Any], *, source: str = "params") -> Params:
    """Validates parsed parameters; raises CatdogError as `load_params` does."""
    try:
        params = Params.model_validate(dict(tree))
    except ValidationError as error:
        problems = "; ".join(dict.fromkeys(_describe(problem) for problem in error.errors()))
        raise CatdogError(f"{source}: {problems}") from None
    for backbone in get_backbones(params.backbone):
        if params.preprocess.image_size < backbone.minimum_size:
            raise CatdogError(
                f"{source}: preprocess.image_size = {params.preprocess.image_size} is too small for backbone "
                f"{backbone.name}; it needs at least {backbone.minimum_size}"
            )
    return params


def _describe(problem: Mapping[str, Any]) -> str:
    """Says in one sentence what is wrong with one value: key, value, what is allowed."""
    # A union's branches (`int`, `float`) end the location with a type's name, which no user wrote.
    location = [str(part) for part in problem["loc"] if part not in ("int", "float")]
    name = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _keys_beside(location)
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys here: {', '.join(known)}"
        return f"unknown parameter {name}; {hint}"
    if problem["type"] == "missing":
        return f"parameter {name} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name} = {problem['input']!r}: {message[0].lower()}{message[1:]}"


def _keys_beside(location: list[str]) -> list[str]:
    """The keys that params.yaml may hold at the place of the last part of `location`."""
    model: type[BaseModel] = Params
    for part in location[:-1]:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return list(model.model_fields)
