"""Images whose label the data itself contradicts: `catdog audit`.

A model that was trained on a wrong label has learnt it, so its own probability is no witness. Here every image
is judged by a linear head that was fitted on the features of other images only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from catdog import paths
from catdog.archives import MemberError, open_archive, read_member
from catdog.errors import CatdogError
from catdog.evaluation_plots import plot_gallery
from catdog.features import FeatureSet, open_features
from catdog.files import read_json, read_manifest, write_text
from catdog.images import decode
from catdog.runtime import prepare_keras

SUSPECTS = Path("reports/suspects.csv")
SUSPECTS_PICTURE = Path("reports/suspects.png")
EXCLUSION_COLUMNS = ["path", "sha256", "reason"]

# Weak enough to separate, strong enough that one wrong label does not bend the boundary around itself: of 1, 0.1,
# 0.01, 0.001 and 0.0001 the best or nearly so, by out-of-fold log loss, from 300 to 12,000 images and 2 to 37 classes.
_INVERSE_REGULARISATION = 0.01
_MAX_FEATURES = 4096
_PROJECTED_FEATURES = 1024
_PRINTED = 10


def run_audit(
    root: Path,
    *,
    seed: int,
    top: int = 40,
    minimum: float = 0.9,
    exclude: Path | None = None,
    include_test: bool = False,
) -> pd.DataFrame:
    """Lists the images whose label is contradicted, most surely wrong first, with a montage.

    Writes `reports/suspects.csv` (all of them) and `reports/suspects.png` (the first `top`), and prints a summary.

    Args:
        root: the repository's root, where `dvc repro` has run.
        seed: draws the folds.
        top: number of pictures in the montage.
        minimum: the probability of the suggested label from which an image goes into the exclusion list.
        exclude: CSV to add such images to (columns path, sha256, reason), as `split.exclude` reads it; made when
            there is none; a relative path starts at `root`. What it holds already is kept.
        include_test: also exclude images of the test split; without it they are listed only, because a model must
            not choose its own exam.

    Returns:
        The suspects, ranked: path, label, suggested, probability_of_label, probability_of_suggested, split.

    Raises:
        CatdogError: an option is impossible, the pipeline has not run or its outputs do not fit together, there
            are too few images, or the exclusion list cannot be read.
    """
    if top < 1:
        raise CatdogError(f"top = {top} pictures make no montage; give 1 or more")
    if not 0 <= minimum <= 1:
        raise CatdogError(f"minimum = {minimum} is no probability; give a number from 0 to 1")
    # Before the work, so that a broken list does not cost it.
    excluded = _read_exclusions(root / exclude) if exclude is not None else None
    prepare_keras(seed)  # TensorFlow, which reads the records, is quiet then
    images, features, classes = _load(root, seed)
    labels = np.asarray([classes.index(label) for label in images["label"]], np.int64)
    found = find_suspects(features, labels, images["group"].to_numpy(), seed=seed)
    suspects = images.iloc[found["position"]].reset_index(drop=True)
    suspects["suggested"] = [classes[number] for number in found["suggested"]]
    for column in ("probability_of_label", "probability_of_suggested"):
        suspects[column] = found[column].round(4)

    shown = suspects.head(top)
    pictures = _read_pictures(root / paths.RAW, shown["path"].tolist(), shown["sha256"].tolist())
    certain = suspects[suspects["probability_of_suggested"] >= minimum]
    columns = ["path", "label", "suggested", "probability_of_label", "probability_of_suggested", "split"]
    plot_gallery(
        map(decode, pictures),
        [
            f"{rank}. {row.label} → {row.suggested}\n{row.probability_of_suggested:.3f}, {row.split}"
            for rank, row in enumerate(shown.itertuples(), start=1)
        ],
        root / SUSPECTS_PICTURE,
        title=f"{len(shown)} of {len(suspects):,} contradicted labels (label → what the other images suggest)",
    )
    write_text(root / SUSPECTS, suspects[columns].to_csv(index=False))
    if len(shown):
        print(shown[columns].head(_PRINTED).to_string(index=False))
    print(
        f"audit: {len(suspects):,} of {len(images):,} labels are contradicted, {len(certain):,} with a probability "
        f"of {minimum:g} or more; see {SUSPECTS} and {SUSPECTS_PICTURE}"
    )
    if exclude is not None and excluded is not None:
        in_test = certain["split"] == "test"
        merged = add_exclusions(excluded, certain if include_test else certain[~in_test])
        write_text(root / exclude, merged.to_csv(index=False))
        print(f"audit: {exclude} names {len(merged):,} images, {len(merged) - len(excluded):,} of them new")
        if in_test.any() and not include_test:
            print(
                f"audit: not excluded, because a model must not choose its own exam: {in_test.sum():,} of the test "
                "split; look at them, and exclude them with --include-test if their labels are wrong"
            )
    return suspects[columns]


def find_suspects(
    features: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64] | npt.NDArray[np.str_],
    *,
    folds: int = 5,
    seed: int,
) -> pd.DataFrame:
    """Finds the images whose label is not the most probable one, ranked by how surely it is wrong.

    Ranked by the normalised margin: the probability of the label minus that of the most probable other class, out of
    fold (C. Northcutt, L. Jiang, I. Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR 70,
    2021). For two classes that is the order of self-confidence.

    Args:
        features: [images, n].
        labels: class numbers [images], 0 to classes - 1.
        groups: the same value for images that belong together; they are never judged by each other [images].
        folds: into how many parts the images are cut.
        seed: draws the folds.

    Returns:
        A row a suspect, most surely wrong first: position (in the arguments), label, suggested (class numbers),
        probability_of_label, probability_of_suggested (0..1).

    Raises:
        CatdogError: as `out_of_fold_probabilities`.
    """
    probabilities = out_of_fold_probabilities(features, labels, groups, folds=folds, seed=seed)
    everyone = np.arange(len(labels))
    others = probabilities.copy()
    others[everyone, labels] = -1
    # Nobody can judge a class that only its own fold knows: those rows are NaN, and no suspects.
    suggested = np.nan_to_num(others, nan=-1).argmax(axis=1)
    table = pd.DataFrame(
        {
            "position": everyone,
            "label": labels,
            "suggested": suggested,
            "probability_of_label": probabilities[everyone, labels],
            "probability_of_suggested": probabilities[everyone, suggested],
        }
    )
    # Rounded, so that the last bits, which depend on the machine's number of threads, cannot change the order.
    margin = (table["probability_of_label"] - table["probability_of_suggested"]).round(6)
    order = margin[margin < 0].sort_values(kind="stable").index
    return table.loc[order].reset_index(drop=True)


def out_of_fold_probabilities(
    features: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64] | npt.NDArray[np.str_],
    *,
    folds: int,
    seed: int,
) -> npt.NDArray[np.float64]:
    """Judges each image by a linear head that saw neither it nor an image of its group.

    The head is a logistic regression on standardised features; classes keep their shares in every fold where groups
    allow it.

    Returns:
        float64 [images, classes], rows of sum 1; NaN where the image's class has no image in the other folds.

    Raises:
        CatdogError: fewer groups than folds, or no class with as many images as folds.
    """
    import warnings

    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.preprocessing import StandardScaler

    counts = np.bincount(labels)
    if len(np.unique(groups)) < folds or counts.max() < folds:
        raise CatdogError(
            f"an audit in {folds} folds needs as many groups of images and a class of at least {folds} images; the "
            f"data has {len(np.unique(groups))} groups and at most {counts.max()} images a class; add images"
        )
    result = np.full((len(labels), len(counts)), np.nan)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A class with fewer images than folds is dealt with below.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        parts = list(splitter.split(features, labels, groups))
    for others, left_out in parts:
        known = np.unique(labels[others])
        if len(known) < 2:
            continue
        scaler = StandardScaler().fit(features[others])
        head = LogisticRegression(C=_INVERSE_REGULARISATION, tol=1e-3, max_iter=500, random_state=seed)
        head.fit(scaler.transform(features[others]), labels[others])
        judged = left_out[np.isin(labels[left_out], known)]
        if len(judged):
            result[judged] = 0
            result[np.ix_(judged, known)] = head.predict_proba(scaler.transform(features[judged]))
    return result


def add_exclusions(existing: pd.DataFrame, suspects: pd.DataFrame) -> pd.DataFrame:
    """Adds suspects to an exclusion list; an image that the list names already is not named twice.

    Args:
        existing: columns path, sha256, reason and any others; empty texts where a row does not know one.
        suspects: columns path, sha256, label, suggested, probability_of_suggested.

    Returns:
        The columns of `existing`, sorted by path and content.
    """
    by_path = set(existing.loc[existing["sha256"] == "", "path"])
    named = suspects["sha256"].isin(set(existing["sha256"].str.lower())) | suspects["path"].isin(by_path)
    new = suspects[~named]
    rows = pd.DataFrame(
        {
            "path": new["path"],
            "sha256": new["sha256"],
            "reason": [
                f"labelled {row.label}, looks like {row.suggested} ({row.probability_of_suggested:.3f})"
                for row in new.itertuples()
            ],
        }
    )
    merged = pd.concat([existing, rows]).fillna("").drop_duplicates()
    return merged.sort_values(["path", "sha256"], kind="stable", ignore_index=True)


def _read_exclusions(path: Path) -> pd.DataFrame:
    """Reads an exclusion list as text; empty when there is no such file."""
    if not path.exists():
        return pd.DataFrame(columns=EXCLUSION_COLUMNS, dtype=str)
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        reason = " ".join(str(error).split())
        raise CatdogError(f"the exclusion list {path} cannot be read ({reason}); mend it or name another") from None
    if not isinstance(table.index, pd.RangeIndex):
        # pandas then takes the first fields for names of the rows, which would not be written again.
        raise CatdogError(
            f"the exclusion list {path} has more fields in its rows than names in its header; name each column, and "
            "put texts with a comma in quotes"
        )
    if not {"path", "sha256"} & set(table.columns):
        raise CatdogError(f"the exclusion list {path} has neither a column path nor sha256; mend it or name another")
    for column in EXCLUSION_COLUMNS:
        if column not in table.columns:
            table[column] = ""
    return table[EXCLUSION_COLUMNS + [name for name in table.columns if name not in EXCLUSION_COLUMNS]]


def _load(root: Path, seed: int) -> tuple[pd.DataFrame, npt.NDArray[np.float32], list[str]]:
    """Reads the images' rows of the manifest and their features, in the same order, and the class names.

    Raises:
        CatdogError: something is missing, or does not belong to the same run of the pipeline.
    """
    for path in (paths.MANIFEST, paths.DATA_REPORT, paths.RAW, paths.TFRECORDS, paths.FEATURES):
        if not (root / path).exists():
            raise CatdogError(f"{path} does not exist, and an audit needs it; run `dvc repro` first")
    classes: list[str] = read_json(root / paths.DATA_REPORT)["classes"]
    manifest = read_manifest(root / paths.MANIFEST)
    rows, features = [], []
    for split in paths.SPLITS:
        embedded = sorted((root / paths.FEATURES).glob(f"{split}-*.features.npy"))
        shards = [root / paths.TFRECORDS / path.name.replace(".features.npy", ".tfrecord") for path in embedded]
        if not shards or not all(shard.exists() for shard in shards):
            raise _stale(f"{paths.FEATURES} and {paths.TFRECORDS} hold different shards of the split {split}")
        held = open_features(root / paths.FEATURES, split)
        # The features lie in the order of the records, and those know where they come from.
        order = _recorded_paths(shards)
        here = manifest[manifest["split"] == split].set_index("path", drop=False)
        if len(order) != len(held.labels) or set(order) != set(here.index) or len(order) != len(here):
            raise _stale(f"the images of the split {split} in {paths.FEATURES} are not those of {paths.MANIFEST}")
        here = here.loc[order].reset_index(drop=True)
        if here["label"].tolist() != [classes[number] for number in held.labels]:
            raise _stale(f"the labels of the split {split} in {paths.FEATURES} are not those of {paths.MANIFEST}")
        rows.append(here)
        features.append(_read_features(held, seed))
    return pd.concat(rows, ignore_index=True), np.concatenate(features), classes


def _stale(what: str) -> CatdogError:
    return CatdogError(f"{what}; run `dvc repro` to bring them up to date")


def _recorded_paths(shards: Sequence[Path]) -> list[str]:
    """The images' paths in TFRecord files, in order, without decoding the images."""
    import tensorflow as tf

    schema = {"image/path": tf.io.FixedLenFeature([], tf.string)}
    dataset = tf.data.TFRecordDataset([str(path) for path in shards]).batch(256)
    batches = dataset.map(lambda records: tf.io.parse_example(records, schema)["image/path"])
    return [name.decode() for batch in batches.as_numpy_iterator() for name in batch]


def _read_features(held: FeatureSet, seed: int) -> npt.NDArray[np.float32]:
    """The features of a split, float32 [images, n]; very wide ones (pooling: flatten) as a random projection.

    Distances, and with them linear boundaries, survive it (D. Achlioptas, "Database-friendly random projections",
    2003), and the memory for 25,000 VGG16 maps falls from 2.5 GB to 0.1 GB.
    """
    if held.size <= _MAX_FEATURES:
        return np.concatenate(held.shards)
    from sklearn.random_projection import SparseRandomProjection

    projection = SparseRandomProjection(_PROJECTED_FEATURES, dense_output=True, random_state=seed)
    projection.fit(held.shards[0][:1])
    return np.concatenate([np.asarray(projection.transform(shard), np.float32) for shard in held.shards])


def _read_pictures(raw: Path, names: Sequence[str], digests: Sequence[str]) -> list[bytes]:
    """Reads files of the raw archive and checks that they are the ones that the manifest means."""
    pictures = []
    with open_archive(raw) as archive:
        for name, digest in zip(names, digests, strict=True):
            try:
                data = read_member(archive, name)
            except (KeyError, MemberError):
                data = b""
            if hashlib.sha256(data).hexdigest() != digest:
                raise _stale(f"{name} in {paths.RAW} is not the file that {paths.MANIFEST} lists")
            pictures.append(data)
    return pictures


__all__ = [
    "EXCLUSION_COLUMNS",
    "SUSPECTS",
    "SUSPECTS_PICTURE",
    "add_exclusions",
    "find_suspects",
    "out_of_fold_probabilities",
    "run_audit",
]
