"""A network of two convolutions and pictures of two colours: fine-tuning in a second."""

from pathlib import Path

import numpy as np

from catdog.backbones import Backbone
from catdog.config import AugmentParams, FineTuneParams, TrainParams
from catdog.features import FeatureSet
from catdog.fine_tuning import Images
from catdog.images import encode_jpeg

SIZE = 16
BACKBONE = Backbone("tiny", "none", SIZE, SIZE, "tf", "top_conv", "top_conv", "none", "none", "none")
AUGMENT = AugmentParams()


def pretended_devices(count: int, *flags: str) -> dict[str, str]:
    """The environment in which JAX takes this machine's CPU for so many devices."""
    # XLA has a thread for each core. Devices that wait for each other hold one each, and on a machine of two cores
    # sometimes none is left for the work that they wait for.
    return {"XLA_FLAGS": " ".join([f"--xla_force_host_platform_device_count={count}", *flags]), "NPROC": "16"}


def train_params(**changes) -> TrainParams:
    return TrainParams(**{"dropout": 0.0, "learning_rate": 0.02, "batch_size": 8, "epochs": 5, **changes})


def fine_tune_params(**changes) -> FineTuneParams:
    return FineTuneParams(
        **{"layers": "last_block", "learning_rate": 0.01, "batch_size": 8, "epochs": 4, "patience": 99, **changes}
    )


def network(name="tiny", channels=8):
    """Two convolutions with BatchNorm behind each; random weights by seed."""
    import keras

    def convolution(name, number):
        return keras.layers.Conv2D(
            channels, 3, 2, "same", kernel_initializer=keras.initializers.HeNormal(seed=number), name=name
        )

    pixels = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.ReLU(name="stem_relu")(
        keras.layers.BatchNormalization(name="stem_bn")(convolution("stem_conv", 1)(pixels))
    )
    x = keras.layers.ReLU(name="top_relu")(
        keras.layers.BatchNormalization(name="top_bn")(convolution("top_conv", 2)(x))
    )
    return keras.Model(pixels, x, name=name)


def model(params, *, classes=2):
    """The assembled model, its network and its head, as the train stage builds them."""
    from catdog.model import assemble, build_head
    from catdog.runtime import prepare_keras

    prepare_keras(1)
    body = network()
    head = build_head(8, classes, params, 1)
    return assemble([body], [BACKBONE], head, SIZE, "avg"), body, head


class Data:
    """Pictures whose class is a hue under noise, in TFRecord shards that hold one class after the other."""

    def __init__(self, folder: Path, *, train=40, val=26, noise=60) -> None:
        """Writes the shards."""
        self.folder, self.labels, self.pixels, self.shards = folder, {}, {}, {}
        rng = np.random.default_rng(0)
        for split, count in (("train", train), ("val", val)):
            labels = np.sort(rng.integers(0, 2, count))
            pixels = rng.integers(0, noise + 100, (count, SIZE, SIZE, 3))
            pixels[np.arange(count), :, :, labels] += 30
            self.labels[split], self.pixels[split] = labels, pixels.astype(np.uint8)
            self.shards[split] = self._write(split)

    def _write(self, split, per_shard=15):
        import tensorflow as tf

        def feature(value):
            if isinstance(value, bytes):
                return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
            return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

        paths = []
        for first in range(0, len(self.labels[split]), per_shard):
            path = self.folder / f"{split}-{first:05d}.tfrecord"
            with tf.io.TFRecordWriter(str(path)) as writer:
                for number in range(first, min(first + per_shard, len(self.labels[split]))):
                    fields = {
                        "image/encoded": encode_jpeg(self.pixels[split][number], 100),
                        "image/class/label": int(self.labels[split][number]),
                        "image/path": str(number).encode(),
                    }
                    features = tf.train.Features(feature={name: feature(value) for name, value in fields.items()})
                    writer.write(tf.train.Example(features=features).SerializeToString())
            paths.append(path)
        return tuple(paths)

    def images(self, split) -> Images:
        """What fine-tuning reads."""
        return Images(self.shards[split], self.labels[split])

    def features(self, body, split) -> FeatureSet:
        """What embed would store of it."""
        from catdog.model import build_extractor

        extractor = build_extractor([body], [BACKBONE], SIZE, "avg")
        values = np.asarray(extractor(self.stored(split), training=False))
        return FeatureSet((values,), np.array([0, len(values)]), self.labels[split])

    def stored(self, split) -> np.ndarray:
        """The pixels as they come out of the shards, float32."""
        from catdog.records import RecordReader

        return np.concatenate(list(RecordReader(list(self.shards[split]), 7))).astype(np.float32)
