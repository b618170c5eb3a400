"""A trained model in the formats of other runtimes: TensorFlow Lite, ONNX, SavedModel and OpenVINO.

Every export takes uint8 pixels [batch, size, size, 3], RGB, and gives float32 probabilities [batch, classes]. Bytes
are what a decoded picture consists of: they need no conversion, and pixels scaled to 0..1 are refused by their type.
One column a class, also where the Keras model has a single sigmoid, so that every export is read in one way.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from catdog.errors import CatdogError
from catdog.files import ZIP_DATE
from catdog.images import Pixels
from catdog.inference import frozen, import_openvino, openvino_network
from catdog.model import ModelInfo
from catdog.runtime import notices_held_back

if TYPE_CHECKING:
    import keras

Format = Literal["tflite", "onnx", "saved_model", "openvino"]
Precision = Literal["float32", "float16", "int8"]

DESCRIPTION = "catdog.json"
"""What an export says about itself is called so, wherever its format has a place for it."""
DESCRIPTION_KEY = "catdog"
"""The key of the same text where the format has keys."""
NETWORK = "model.xml"
"""The file in an export to OpenVINO that names the others."""

# The newest that tf2onnx writes. Its own choice, 15, was superseded in 2022.
_OPSET = 18
# Parts of the names of the operations from the last layer on. In int8 they would gain nothing, as they are hardly any
# of the work, and would cost most: 256 different logits are few.
_KEPT_IN_FLOAT = ("/logits", "/temperature", "/probabilities", "class_columns")


@dataclass(frozen=True)
class FormatFacts:
    """What a format can do, and what it takes to write and run it."""

    precisions: tuple[Precision, ...]
    packages: tuple[str, ...] = ()  # that are not there with every installation
    int8_packages: tuple[str, ...] = ()  # further ones
    extra: str = ""  # of the project, that brings the packages


FORMATS: Mapping[Format, FormatFacts] = {
    "tflite": FormatFacts(("float32", "float16", "int8")),
    "onnx": FormatFacts(("float32", "float16", "int8"), ("onnx", "onnxruntime", "tf2onnx"), extra="onnx"),
    "saved_model": FormatFacts(("float32",)),
    "openvino": FormatFacts(("float32", "float16", "int8"), ("openvino",), ("nncf",), extra="openvino"),
}


def require_format(format_: Format, precision: Precision) -> None:
    """Raises CatdogError where the format has no such precision, or a package for it is not installed."""
    facts = FORMATS[format_]
    if precision not in facts.precisions:
        raise CatdogError(f"{format_} has no {precision}; it has {', '.join(facts.precisions)}")
    packages = facts.packages + (facts.int8_packages if precision == "int8" else ())
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise CatdogError(
            f"{precision} in {format_} needs {' and '.join(missing)}, not installed here; "
            f"`pip install 'catdog[{facts.extra}]'` installs what is missing"
        )


def describe(info: ModelInfo, precision: Precision, *, model_sha256: str, calibration_images: int) -> dict[str, Any]:
    """Returns what an export says about itself, for those who have nothing else.

    Args:
        info: what the Keras model says about itself.
        precision: of the export.
        model_sha256: of the Keras model's file.
        calibration_images: how many training images gave the ranges of int8; 0 for the other precisions.
    """
    size, classes = info.image_size, len(info.class_names)
    return {
        **asdict(info),
        "input": f"pixels: uint8 [batch, {size}, {size}, 3], RGB, 0..255",
        "output": f"probabilities: float32 [batch, {classes}], 0..1, one column a class, in the order of class_names",
        "precision": precision,
        "model_sha256": model_sha256,
        "calibration_images": calibration_images,
    }


def write_export(
    model: keras.Model,
    description: Mapping[str, Any],
    target: Path,
    format_: Format,
    precision: Precision,
    *,
    calibration: Pixels | None = None,
) -> None:
    """Writes a model in another format.

    The bytes depend on the arguments alone, in a process that exports but once: TensorFlow counts what it names.

    Args:
        model: from `model.load_model`, with the TensorFlow backend.
        description: from `describe`; becomes a part of the export.
        target: where nothing is yet: a file (tflite, onnx), or a folder (saved_model, openvino).
        format_: one of FORMATS.
        precision: one that the format has.
        calibration: for int8, pictures as the model sees them, uint8 [images, size, size, 3].

    Raises:
        CatdogError: the format cannot express the network.
    """
    text = json.dumps(description, indent=2)
    with _quiet():
        if format_ == "tflite":
            _write_tflite(model, text, target, precision, calibration)
        elif format_ == "onnx":
            _write_onnx(model, text, target, precision, calibration)
        elif format_ == "openvino":
            _write_openvino(model, text, target, precision, calibration)
        else:
            _write_saved_model(model, text, target)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what the converters tell of their progress from the screen, unless they fail."""
    loggers = [logging.getLogger(name) for name in ("absl", "tf2onnx", "nncf", "root")]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        notices_held_back(),
    ):
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def class_columns(model: keras.Model) -> Callable[[Any], Any]:
    """Returns a TensorFlow function from pixels [batch, size, size, 3] to probabilities [batch, classes], float32."""
    import tensorflow as tf

    def infer(pixels: Any) -> Any:
        output = model(tf.cast(pixels, tf.float32), training=False)
        if output.shape[-1] > 1:
            return output
        with tf.name_scope("class_columns"):
            # 1 - p and p. Every runtime has the product of matrices in float, beside layers in int8.
            return tf.linalg.matmul(output, tf.constant([[-1.0, 1.0]])) + tf.constant([1.0, 0.0])

    return infer


def _kept_in_float(name: str) -> bool:
    return any(part in name for part in _KEPT_IN_FLOAT)


def _write_tflite(
    model: keras.Model, description: str, target: Path, precision: Precision, calibration: Pixels | None
) -> None:
    # `tf.lite` is to give way to the package ai-edge-litert, which asks for another protobuf than the rest here.
    import tensorflow as tf

    # One picture a time: phones ask so, and most of their accelerators take nothing but fixed shapes.
    function = frozen(model, class_columns(model), batch=1)

    def converter() -> Any:
        return tf.lite.TFLiteConverter.from_concrete_functions([function])

    if precision == "float32":
        content = converter().convert()
    elif precision == "float16":
        half = converter()
        half.optimizations = [tf.lite.Optimize.DEFAULT]
        half.target_spec.supported_types = [tf.float16]
        content = half.convert()
    else:
        assert calibration is not None
        content = _convert_to_int8(converter(), converter().convert(), calibration)
    target.write_bytes(content)
    # As TensorFlow Lite's own metadata has it: files are a zip behind the network (www.tensorflow.org/lite/models/
    # convert/metadata, "associated files"), and the runtime does not mind.
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr(zipfile.ZipInfo(DESCRIPTION, ZIP_DATE), description)


def _convert_to_int8(converter: Any, in_float: bytes, calibration: Pixels) -> bytes:
    """Converts to int8, but for the input, which is uint8, and the last layer."""
    import tensorflow as tf

    def pictures() -> Iterator[list[Pixels]]:
        return ([picture[np.newaxis]] for picture in calibration)

    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = pictures
    tensors = tf.lite.Interpreter(model_content=in_float).get_tensor_details()
    # The way to leave operations out (www.tensorflow.org/lite/performance/quantization_debugger, "selective
    # quantization"). The output bears no name of an operation.
    options = tf.lite.experimental.QuantizationDebugOptions(
        denylisted_nodes=[
            tensor["name"] for tensor in tensors if _kept_in_float(tensor["name"]) or tensor["name"] == "Identity"
        ]
    )
    debugger = tf.lite.experimental.QuantizationDebugger(
        converter=converter, debug_dataset=pictures, debug_options=options
    )
    content: bytes = debugger.get_nondebug_quantized_model()
    return content


def _write_onnx(
    model: keras.Model, description: str, target: Path, precision: Precision, calibration: Pixels | None
) -> None:
    import onnx
    import tf2onnx.convert
    from keras.src.export.tf2onnx_lib import patch_tf2onnx

    patch_tf2onnx()  # it still uses what NumPy 2 dropped; Keras mends that for its own export
    function = frozen(model, class_columns(model))
    network, _ = tf2onnx.convert.from_graph_def(
        function.graph.as_graph_def(),
        input_names=[function.inputs[0].name],
        output_names=[function.outputs[0].name],
        opset=_OPSET,
    )
    # tf2onnx only logs what it cannot convert, and leaves TensorFlow's operation in its place.
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    if strange := sorted({node.op_type for node in network.graph.node} - known):
        raise CatdogError(
            f"tf2onnx has nothing for {' and '.join(strange)} in this network, as for the grouped convolutions and the "
            "GELU of convnexttiny; choose another format"
        )
    _rename(network)
    if precision == "float16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        network = convert_float_to_float16(network, keep_io_types=True)
    elif precision == "int8":
        assert calibration is not None
        network = _quantize_onnx(network, target, calibration)
    # quantize_static writes them in an order that differs from process to process.
    ordered = sorted(network.graph.initializer, key=lambda value: value.name)
    del network.graph.initializer[:]
    network.graph.initializer.extend(ordered)
    onnx.helper.set_model_props(network, {DESCRIPTION_KEY: description})
    onnx.save(network, target)


def _rename(network: Any) -> None:
    """Gives an ONNX network names that depend on nothing but the network, in place of TensorFlow's and tf2onnx's.

    What tf2onnx adds, it numbers in an order that differs from process to process; here it is that of the operations.
    Of equal constants it keeps one by chance, with its name.
    """
    (start,), (end,) = network.graph.input, network.graph.output
    known = {start.name: "pixels", end.name: "probabilities"}
    constants = {value.name for value in network.graph.initializer}
    numbers: dict[str, str] = {}

    def renamed(name: str) -> str:
        if name in known:
            return known[name]
        number = re.search(r"(?<=__)\d+", name)
        if number is None:
            return name
        numbered = numbers.setdefault(number[0], str(len(numbers)))
        return f"constant__{numbered}" if name in constants else name.replace(f"__{number[0]}", f"__{numbered}")

    for node in network.graph.node:
        node.name = renamed(node.name)
        node.input[:] = map(renamed, node.input)
        node.output[:] = map(renamed, node.output)
    for value in (*network.graph.initializer, *network.graph.value_info, start, end):
        value.name = renamed(value.name)
    for value in (start, end):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"


def _quantize_onnx(network: Any, target: Path, calibration: Pixels) -> Any:
    """Returns an ONNX network whose operations, but for the last layer, are in int8, with QuantizeLinear between."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Pictures(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._pictures = iter(calibration)

        def get_next(self) -> dict[str, Pixels] | None:
            picture = next(self._pictures, None)
            return None if picture is None else {"pixels": picture[np.newaxis]}

    whole = target.with_name(target.name + ".float32")
    prepared = target.with_name(target.name + ".prepared")
    try:
        onnx.save(network, whole)
        # ONNX itself infers every shape here; the inference by symbols does not know the operation of pooling "max".
        quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        # A range for each channel of a kernel: with one for all, MobileNetV2 gave 3 of 10 photographs another label.
        quantize_static(
            prepared,
            target,
            Pictures(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            # Unsigned: where a processor has no instructions for it (VNNI), ONNX Runtime's sums with signed weights
            # overflow. On one with AVX2 that gave 6 of 400 photographs another label (weights in 7 bits: 4), this 2.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QUInt8,
            nodes_to_exclude=[node.name for node in onnx.load(prepared).graph.node if _kept_in_float(node.name)],
        )
    finally:
        whole.unlink(missing_ok=True)
        prepared.unlink(missing_ok=True)
    return onnx.load(target)


def _write_openvino(
    model: keras.Model, description: str, target: Path, precision: Precision, calibration: Pixels | None
) -> None:
    openvino = import_openvino()

    network = openvino_network(model, class_columns(model))
    if precision == "int8":
        assert calibration is not None
        import nncf

        pictures = nncf.Dataset(calibration, lambda picture: picture[np.newaxis])
        names = [operation.get_friendly_name() for operation in network.get_ordered_ops()]
        kept = nncf.IgnoredScope(names=[name for name in names if _kept_in_float(name)], validate=False)
        network = nncf.quantize(network, pictures, subset_size=len(calibration), ignored_scope=kept)
    network.input().get_tensor().set_names({"pixels"})
    network.output().get_tensor().set_names({"probabilities"})
    network.set_rt_info(description, DESCRIPTION_KEY)
    target.mkdir()
    openvino.save_model(network, target / NETWORK, compress_to_fp16=precision == "float16")


def _write_saved_model(model: keras.Model, description: str, target: Path) -> None:
    import tensorflow as tf
    from tensorflow.core.protobuf import fingerprint_pb2

    infer = class_columns(model)
    size = model.input_shape[1]
    exported = tf.Module()
    exported.model = model  # for its variables
    exported.serve = tf.function(
        lambda pixels: {"probabilities": infer(pixels)},
        input_signature=[tf.TensorSpec((None, size, size, 3), tf.uint8, name="pixels")],
    )
    asset = target.with_name(DESCRIPTION)
    asset.write_text(description, encoding="utf-8")
    try:
        exported.description = tf.saved_model.Asset(str(asset))
        tf.saved_model.save(exported, str(target), signatures=exported.serve)
    finally:
        asset.unlink()
    # A number drawn for each that is saved; the other members are hashes of what is in it.
    fingerprint = fingerprint_pb2.FingerprintDef.FromString((target / "fingerprint.pb").read_bytes())
    fingerprint.uuid = ""
    (target / "fingerprint.pb").write_bytes(fingerprint.SerializeToString(deterministic=True))
