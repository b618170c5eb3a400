"""The networks a run can start from: what each one expects, where it may be cut, who made it.

A backbone is a network of ``keras.applications`` without its ImageNet classifier. This module
holds one record per backbone and four functions: :func:`get_backbone` finds a record by name,
:func:`get_backbones` those of "mobilenetv2+vgg16", :func:`build_backbone` builds the network (with
random weights; :mod:`catdog.weights` fills them), :func:`preprocess` turns pixels into what the
network was trained on.

Importing this module imports no deep-learning framework, so parameters can be checked quickly.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from catdog.errors import CatdogError

if TYPE_CHECKING:
    import keras

Preprocessing = Literal["tf", "torch", "caffe", "builtin"]

# Keras leaves the last layer of some networks without a name of its own ("activation_19",
# "layer_normalization": the number depends on what was built before in the same process).
# `build_backbone` gives such a layer this name, so that saved models can be searched for it.
LAST_ACTIVATION = "last_activation"


@dataclass(frozen=True)
class Backbone:
    """What the pipeline has to know about one network.

    Attributes:
        name: the name users type, for example "mobilenetv2".
        builder: the function in ``keras.applications``, for example "MobileNetV2".
        native_size: pixels per side of the images the published weights were made for.
        minimum_size: the smallest side (pixels) Keras accepts without the classifier.
        preprocessing: what the network expects; see :func:`preprocess`.
        fine_tune_from: the layer where fine-tuning may start: this layer and all after it are
            unfrozen. It is the first layer of the network's last block, the one that computes
            the coarsest feature maps. (InceptionV3: the join right before that block, because
            Keras does not name the layers inside.)
        last_convolution: the layer whose output, float [batch, h, w, channels], is the last
            convolutional activation. Class activation maps (Grad-CAM) are read there.
        license: SPDX identifier of the licence of the ImageNet weights.
        source: who published the weights, and where.
        weights_file: the name under which Keras stores the ImageNet weights (without the
            classifier) in ``<Keras cache>/models``.
        shipped: the file with the ImageNet weights under ``pretrained/``, or None.
        shipped_sha256: the SHA-256 of that file (64 hexadecimal digits), or None.
    """

    name: str
    builder: str
    native_size: int
    minimum_size: int
    preprocessing: Preprocessing
    fine_tune_from: str
    last_convolution: str
    license: str
    source: str
    weights_file: str
    shipped: str | None = None
    shipped_sha256: str | None = None


_VGG_SOURCE = (
    "Karen Simonyan and Andrew Zisserman, Visual Geometry Group, Oxford (arXiv:1409.1556); Caffe weights"
    " ported by Keras"
)
_RESNET_SOURCE = "Kaiming He et al., github.com/KaimingHe/deep-residual-networks; Caffe weights ported by Keras"
_EFFICIENTNET_SOURCE = (
    "Google, github.com/tensorflow/tpu (models/official/efficientnet, arXiv:1905.11946), ported by Keras"
)

_ALL = (
    Backbone(
        name="mobilenetv2",
        builder="MobileNetV2",
        native_size=224,
        minimum_size=32,
        preprocessing="tf",
        fine_tune_from="block_13_expand",
        last_convolution="out_relu",
        license="Apache-2.0",
        source="Google, The TensorFlow Authors (arXiv:1801.04381), the TensorFlow Hub release",
        weights_file="mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5",
        shipped="mobilenetv2_imagenet_notop_fp16.weights.h5",
        shipped_sha256="5006146578d05e65b91ec0c007209d027f70327ad53b4fe9db874c1c17a5409b",
    ),
    Backbone(
        name="vgg16",
        builder="VGG16",
        native_size=224,
        minimum_size=32,
        preprocessing="caffe",
        fine_tune_from="block5_conv1",
        last_convolution="block5_conv3",
        license="CC-BY-4.0",
        source=_VGG_SOURCE,
        weights_file="vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5",
        shipped="vgg16_imagenet_notop_fp16.weights.h5",
        shipped_sha256="66620bcfd738cfe71f5686f2f2537fd64cf6467cff334e374f2e38f4f99ba87a",
    ),
    Backbone(
        name="vgg19",
        builder="VGG19",
        native_size=224,
        minimum_size=32,
        preprocessing="caffe",
        fine_tune_from="block5_conv1",
        last_convolution="block5_conv4",
        license="CC-BY-4.0",
        source=_VGG_SOURCE,
        weights_file="vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5",
    ),
    Backbone(
        name="resnet50",
        builder="ResNet50",
        native_size=224,
        minimum_size=32,
        preprocessing="caffe",
        fine_tune_from="conv5_block1_1_conv",
        last_convolution="conv5_block3_out",
        license="MIT",
        source=_RESNET_SOURCE,
        weights_file="resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5",
    ),
    Backbone(
        name="resnet101",
        builder="ResNet101",
        native_size=224,
        minimum_size=32,
        preprocessing="caffe",
        fine_tune_from="conv5_block1_1_conv",
        last_convolution="conv5_block3_out",
        license="MIT",
        source=_RESNET_SOURCE,
        weights_file="resnet101_weights_tf_dim_ordering_tf_kernels_notop.h5",
    ),
    Backbone(
        name="resnet50v2",
        builder="ResNet50V2",
        native_size=224,
        minimum_size=32,
        preprocessing="tf",
        fine_tune_from="conv5_block1_preact_bn",
        last_convolution="post_relu",
        license="BSD-3-Clause",
        source=(
            "Facebook, github.com/facebook/fb.resnet.torch, according to the documentation of Keras 2;"
            " the preprocessing rather suggests TF-Slim (Apache-2.0)"
        ),
        weights_file="resnet50v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
    ),
    Backbone(
        name="inceptionv3",
        builder="InceptionV3",
        native_size=299,
        minimum_size=75,
        preprocessing="tf",
        fine_tune_from="mixed7",
        last_convolution="mixed10",
        license="Apache-2.0",
        source="Google, TF-Slim (arXiv:1512.00567), ported by Keras",
        weights_file="inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5",
    ),
    Backbone(
        name="xception",
        builder="Xception",
        native_size=299,
        minimum_size=71,
        preprocessing="tf",
        fine_tune_from="block13_sepconv1_act",
        last_convolution="block14_sepconv2_act",
        license="MIT",
        source="François Chollet, trained by the author (arXiv:1610.02357)",
        weights_file="xception_weights_tf_dim_ordering_tf_kernels_notop.h5",
    ),
    Backbone(
        name="densenet121",
        builder="DenseNet121",
        native_size=224,
        minimum_size=32,
        preprocessing="torch",
        fine_tune_from="conv5_block1_0_bn",
        last_convolution="relu",
        license="BSD-3-Clause",
        source="Zhuang Liu et al., github.com/liuzhuang13/DenseNet (arXiv:1608.06993), ported by Keras",
        weights_file="densenet121_weights_tf_dim_ordering_tf_kernels_notop.h5",
    ),
    *(
        Backbone(
            name=f"efficientnetb{number}",
            builder=f"EfficientNetB{number}",
            native_size=native_size,
            minimum_size=32,
            preprocessing="builtin",
            fine_tune_from="block6a_expand_conv",
            last_convolution="top_activation",
            license="Apache-2.0",
            source=_EFFICIENTNET_SOURCE,
            weights_file=f"efficientnetb{number}_notop.h5",
        )
        for number, native_size in enumerate((224, 240, 260, 300))
    ),
    Backbone(
        name="efficientnetv2b0",
        builder="EfficientNetV2B0",
        native_size=224,
        minimum_size=32,
        preprocessing="builtin",
        fine_tune_from="block6a_expand_conv",
        last_convolution="top_activation",
        license="Apache-2.0",
        source="Google, github.com/google/automl (efficientnetv2, arXiv:2104.00298), ported by Keras",
        weights_file="efficientnetv2-b0_notop.h5",
    ),
    Backbone(
        name="mobilenetv3large",
        builder="MobileNetV3Large",
        native_size=224,
        minimum_size=32,
        preprocessing="builtin",
        fine_tune_from="expanded_conv_12_expand",
        last_convolution=LAST_ACTIVATION,
        license="Apache-2.0",
        source="Google, TF-Slim (arXiv:1905.02244), ported by Keras",
        weights_file="weights_mobilenet_v3_large_224_1.0_float_no_top_v2.h5",
    ),
    Backbone(
        name="convnexttiny",
        builder="ConvNeXtTiny",
        native_size=224,
        minimum_size=32,
        preprocessing="builtin",
        fine_tune_from="convnext_tiny_downsampling_block_2",
        last_convolution=LAST_ACTIVATION,
        license="MIT",
        source="Meta, github.com/facebookresearch/ConvNeXt (arXiv:2201.03545), ported by Keras",
        weights_file="convnext_tiny_notop.h5",
    ),
)

BACKBONES: Mapping[str, Backbone] = MappingProxyType({backbone.name: backbone for backbone in _ALL})


def get_backbone(name: str) -> Backbone:
    """Return the record of the backbone called ``name``.

    Raises:
        CatdogError: no backbone has this name; the message lists all names and the nearest one.
    """
    try:
        return BACKBONES[name]
    except KeyError:
        pass
    nearest = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), BACKBONES, n=1)
    hint = f"did you mean '{nearest[0]}'? The backbones are" if nearest else "choose one of"
    raise CatdogError(f"there is no backbone '{name}': {hint} {', '.join(BACKBONES)}")


def get_backbones(names: str) -> tuple[Backbone, ...]:
    """Return the records of one or several backbones, in the order given.

    Args:
        names: one name, or several joined by "+", as in "mobilenetv2+vgg16".

    Raises:
        CatdogError: a name is unknown, as :func:`get_backbone`, or stands there twice.
    """
    backbones = tuple(get_backbone(name) for name in names.split("+"))
    for position, backbone in enumerate(backbones):
        if backbone in backbones[:position]:
            raise CatdogError(f"backbone '{names}' names {backbone.name} twice, which adds nothing: name it once")
    return backbones


def build_backbone(backbone: Backbone, image_size: int) -> keras.Model:
    """Build the network without its classifier, with random weights.

    Args:
        backbone: the record of the network.
        image_size: side of the square images in pixels, at least ``backbone.minimum_size``.

    Returns:
        A functional model: float [batch, image_size, image_size, 3], as :func:`preprocess`
        returns it, to float [batch, h, w, channels].

    Raises:
        CatdogError: ``image_size`` is below the minimum.
    """
    # Checked before Keras does: the message names the parameter, and no framework is loaded.
    if image_size < backbone.minimum_size:
        raise CatdogError(
            f"image size {image_size} is too small for '{backbone.name}':"
            f" use {backbone.minimum_size} or more pixels per side"
        )
    import keras

    builder = getattr(keras.applications, backbone.builder)
    model = builder(weights=None, include_top=False, input_shape=(image_size, image_size, 3))
    if backbone.builder.startswith("EfficientNetB"):
        model = _with_pretrained_scaling(model)
    if backbone.last_convolution == LAST_ACTIVATION:
        model.layers[-1].name = LAST_ACTIVATION
    return model


def _with_pretrained_scaling(model: keras.Model) -> keras.Model:
    """Return a copy of an EfficientNet (version 1) with the scaling its ImageNet weights need.

    The published weights were trained on pixels divided by the variance where all others divide
    by the standard deviation. Keras adds a layer that makes up for it, but only when it builds
    the network with ``weights="imagenet"``; built with ``weights=None``, the network would read
    the same weights and compute something else (github.com/tensorflow/tensorflow/issues/49930).
    The layer has no weights, so the files fit either way.
    """
    import keras

    def call(layer: keras.layers.Layer, *args: keras.KerasTensor, **kwargs: keras.KerasTensor) -> keras.KerasTensor:
        outputs = layer(*args, **kwargs)
        if isinstance(layer, keras.layers.Normalization):
            scale = [1.0 / deviation**0.5 for deviation in _IMAGENET_DEVIATION]
            outputs = keras.layers.Rescaling(scale, name="pretrained_scaling")(outputs)
        return outputs

    return keras.models.clone_model(model, call_function=call)


# Mean and standard deviation of the ImageNet images per channel (red, green, blue), pixels 0..1.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_DEVIATION = (0.229, 0.224, 0.225)

# (mean, standard deviation) per channel (red, green, blue), pixels 0..255.
_STATISTICS: dict[Preprocessing, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "tf": ((127.5,) * 3, (127.5,) * 3),
    "torch": (
        tuple(255.0 * mean for mean in _IMAGENET_MEAN),
        tuple(255.0 * deviation for deviation in _IMAGENET_DEVIATION),
    ),
    "caffe": ((123.68, 116.779, 103.939), (1.0,) * 3),
}


def preprocess(inputs: keras.KerasTensor, backbone: Backbone, *, name: str = "preprocessing") -> keras.KerasTensor:
    """Turn pixels into what the backbone expects, with plain Keras layers and operations.

    The result becomes part of the saved model, so whoever loads the model feeds it pixels; no
    custom object is needed for loading. The values equal those of the backbone's own
    ``preprocess_input`` in ``keras.applications``:

    * "tf": red, green, blue in -1..1
    * "torch": red, green, blue in 0..1, minus the ImageNet mean, over its standard deviation
    * "caffe": blue, green, red in 0..255, minus the ImageNet mean
    * "builtin": the pixels unchanged, because the network starts with rescaling layers

    Args:
        inputs: a Keras tensor or array, float [batch, h, w, 3], red, green, blue in 0..255.
        backbone: the record of the network.
        name: of the layer that does it; unique within a model.

    Returns:
        float32 [batch, h, w, 3] ("builtin": the inputs themselves).
    """
    if backbone.preprocessing == "builtin":
        return inputs
    import keras

    mean, deviation = _STATISTICS[backbone.preprocessing]
    # float32 whatever the policy: half precision cannot hold pixel values after resizing.
    outputs = keras.layers.Normalization(
        mean=list(mean), variance=[value**2 for value in deviation], dtype="float32", name=name
    )(inputs)
    return keras.ops.flip(outputs, axis=-1) if backbone.preprocessing == "caffe" else outputs
