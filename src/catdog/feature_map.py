"""The feature map: the pictures as points in a plane, those that the network finds alike beside each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from catdog.backbones import get_backbones
from catdog.evaluation import LabelledPredictions
from catdog.model import ModelInfo

if TYPE_CHECKING:
    import keras

Method = Literal["tsne", "pca"]

MOST_IMAGES = 1000
"""More points hide each other, and twice as many take t-SNE three times as long."""

# Within what its authors use: some tens of principal components, a perplexity of 5 to 50. After half of their 1,000
# iterations the groups stand. Up to an angle of 0.8 the result hardly changes, says scikit-learn; measured at this one,
# neighbours are as often of one class as at 0.5, in two thirds to five sixths of the time.
_COMPONENTS = 50
_PERPLEXITY = 30.0
_ITERATIONS = 500
_ANGLE = 0.65


def with_features(model: keras.Model, info: ModelInfo) -> keras.Model:
    """Returns a model that gives the features beside the probabilities, from one forward pass.

    The features are what the head sees, the output of the layer "pooling". Where that is every value of the last
    feature maps (pooling "flatten"), their mean over all places is taken instead: alike then means alike in what is
    seen, not in where.

    Args:
        model: from `model.load_model`; stays as it is, and shares its weights.
        info: what it says about itself.

    Returns:
        The same pixels to float32 [batch, n + outputs]; `split_outputs` takes the two apart.
    """
    import keras

    features = [model.get_layer("pooling").output]
    if info.pooling == "flatten":
        backbones = get_backbones(info.backbone)
        names = ["pooling"] if len(backbones) == 1 else [f"pooling_{backbone.name}" for backbone in backbones]
        pool = keras.layers.GlobalAveragePooling2D(dtype="float32")
        features = [pool(model.get_layer(name).input) for name in names]
    # float32 whatever the policy: half precision would round the probabilities.
    joined = keras.layers.Concatenate(dtype="float32", name="features_and_output")([*features, model.output])
    return keras.Model(model.input, joined, name="with_features")


def split_outputs(
    values: npt.NDArray[np.float32], outputs: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Takes apart what a model from `with_features` gives.

    Args:
        values: [images, n + outputs].
        outputs: of the model itself: 1 or the number of classes.

    Returns:
        Features [images, n] and the model's own output [images, outputs].
    """
    return values[:, :-outputs], values[:, -outputs:]


def project(features: npt.NDArray[np.float32], method: Method, seed: int) -> npt.NDArray[np.float32]:
    """Places images in a plane by their features.

    Both begin with a principal component analysis: "pca" takes its first two components, "tsne" starts from these and
    moves the points, by their first 50, until neighbours are neighbours (van der Maaten and Hinton, "Visualizing Data
    using t-SNE", 2008; Barnes-Hut). For t-SNE distances between groups, and their sizes, mean nothing.

    Args:
        features: float32 [images, n]; any number of images.
        method: tsne or pca.
        seed: of what is drawn.

    Returns:
        float32 [images, 2]: the same bytes in each run on one machine.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    count = min(_COMPONENTS if method == "tsne" else 2, *features.shape)
    components = np.zeros((len(features), max(2, count)), np.float32)
    # One picture, or several that are all alike, have no direction in which they differ: they lie on one point.
    if not len(features) or not np.ptp(features, axis=0).any():
        return components[:, :2]
    # Several threads would add up in the order in which they happen to be done. This holds for libraries that are
    # loaded by now.
    with threadpool_limits(1):
        components[:, :count] = PCA(count, random_state=seed).fit_transform(features)
        plane = components[:, :2]
        if method == "tsne":
            tsne = TSNE(
                perplexity=min(_PERPLEXITY, max(1.0, (len(features) - 1) / 3)),  # a third of the neighbours there are
                init=plane / plane[:, 0].std() * 1e-4,  # the width that scikit-learn gives to its own start
                max_iter=_ITERATIONS,
                angle=_ANGLE,
                random_state=seed,
            )
            plane = tsne.fit_transform(components)
    return np.ascontiguousarray(plane, np.float32)


def feature_table(
    predictions: LabelledPredictions, positions: npt.NDArray[np.int64], points: npt.NDArray[np.float32]
) -> pd.DataFrame:
    """Returns one row a point of the map: path, label, predicted, correct, x, y.

    Args:
        predictions: of all images.
        positions: which of them are in the map, from `choose_images`.
        points: their places, float32 [points, 2], from `project`.
    """
    names = np.asarray(predictions.class_names)
    return pd.DataFrame(
        {
            "path": [predictions.paths[position] for position in positions],
            "label": names[predictions.labels[positions]],
            "predicted": names[predictions.predicted[positions]],
            "correct": predictions.correct[positions],
            "x": points[:, 0].astype(np.float64).round(6),
            "y": points[:, 1].astype(np.float64).round(6),
        }
    )
