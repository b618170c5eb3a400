"""From an archive to a manifest: the user's lists, the given splits, and every file in exactly one place."""

import zipfile

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from catdog.archives import open_archive
from catdog.config import SplitParams
from catdog.curation import divide, examine
from catdog.errors import CatdogError
from catdog.images import encode_jpeg
from catdog.quality import require_mostly_accepted


def picture(number: int) -> bytes:
    """A JPEG that looks like no other: coarse noise."""
    noise = np.random.default_rng(number).integers(0, 256, (9, 9, 3), np.uint8)
    return encode_jpeg(np.asarray(Image.fromarray(noise).resize((32, 32))), 95)


def archive_of(path, members: dict[str, bytes]):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


PETS = {f"{label}/{i}.jpg": picture(i + 100 * (label == "dog")) for label in ("cat", "dog") for i in range(20)}


def curate(tmp_path, members, seed=1, **params):
    """The whole way, as the stage goes it: what was examined and how it was divided."""
    block = SplitParams(**{"val": 0.2, "test": 0.2, **params})
    with open_archive(archive_of(tmp_path / "raw.zip", members)) as archive:
        found = examine(archive, block, root=tmp_path, workers=2)
    divided = divide(found.images, block, seed=seed)
    files = [name for name in members if not name.endswith("/")]
    everywhere = pd.concat([divided.manifest["path"], found.rejected["path"], divided.rejected["path"]])
    assert sorted([*everywhere, *found.unlabelled["path"]]) == sorted(files)
    return found, divided


def told(tmp_path, members=PETS, **params) -> str:
    with pytest.raises(CatdogError) as caught:
        curate(tmp_path, members, **params)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def split_of(divided) -> dict[str, str]:
    return dict(zip(divided.manifest["path"], divided.manifest["split"], strict=True))


def test_drawn_split(tmp_path):
    found, divided = curate(tmp_path, {**PETS, "cat/bad.jpg": b"x", "readme.txt": b"y"})
    assert divided.method == "random" and found.classes == ("cat", "dog")
    assert divided.manifest["split"].value_counts().to_dict() == {"train": 24, "val": 8, "test": 8}
    assert "given" not in divided.manifest.columns


def test_folders_of_splits_are_taken_as_given_unless_asked_otherwise(tmp_path):
    folders = {"train": range(12), "val": range(12, 16), "test": range(16, 20)}
    members = {
        f"{s}/{label}/{i}.jpg": PETS[f"{label}/{i}.jpg"]
        for s in folders
        for label in ("cat", "dog")
        for i in folders[s]
    }
    _, divided = curate(tmp_path, members)
    assert divided.method == "given"
    assert split_of(divided) == {name: name.split("/")[0] for name in members}
    _, divided = curate(tmp_path, members, method="random")
    assert divided.method == "random"
    assert split_of(divided) != {name: name.split("/")[0] for name in members}


def test_duplicate_across_given_splits_leaves_training_and_is_listed(tmp_path):
    members = {f"{s}/{name}": data for name, data in PETS.items() for s in [("train", "test")[name.endswith("7.jpg")]]}
    members["train/cat/again.jpg"] = PETS["cat/7.jpg"]
    _, divided = curate(tmp_path, members)
    assert divided.rejected[["path", "reason"]].values.tolist() == [
        ["train/cat/again.jpg", "near-duplicate of an image in the given test split"]
    ]


def test_list_gives_the_split_and_leaves_out_what_it_does_not_name(tmp_path):
    names = sorted(PETS)
    rows = [f"{name},{('train', 'val', 'test')[i % 3]}" for i, name in enumerate(names[:-2])]
    (tmp_path / "splits.csv").write_text("\n".join(["path,split", *rows]))
    found, divided = curate(tmp_path, PETS, file="splits.csv")
    assert divided.method == "given"
    assert split_of(divided) == dict(row.split(",") for row in rows)
    assert found.rejected[["path", "reason"]].values.tolist() == [[n, "not listed in split.file"] for n in names[-2:]]


def test_list_with_labels_needs_no_folders(tmp_path):
    members = {f"all/{i}.jpg": picture(i) for i in range(30)}
    rows = [f"all/{i}.jpg,{('train', 'val', 'test')[i % 3]},{'owl' if i < 15 else 'elk'}" for i in range(30)]
    (tmp_path / "splits.csv").write_text("\n".join(["path,split,label", *rows]))
    found, divided = curate(tmp_path, members, file="splits.csv")
    assert found.classes == ("elk", "owl")
    assert divided.manifest.set_index("path")["label"].to_dict() == {row.split(",")[0]: row[-3:] for row in rows}


def test_list_that_names_a_file_which_is_not_there_is_told(tmp_path):
    (tmp_path / "splits.csv").write_text("path,split\ncat/0.jpg,train\ncat/99.jpg,test\n")
    assert "names 1 files that the data set lacks, 'cat/99.jpg'" in told(tmp_path, file="splits.csv")


def test_excluded_images_are_listed_and_in_no_split(tmp_path):
    (tmp_path / "out.csv").write_text("path,reason\ncat/3.jpg,blurred\n")
    found, divided = curate(tmp_path, PETS, exclude="out.csv")
    assert found.rejected[["path", "reason"]].values.tolist() == [["cat/3.jpg", "excluded: blurred"]]
    assert len(divided.manifest) == 39


def test_damaged_files_that_the_user_left_out_are_listed_as_that_and_do_not_count(tmp_path):
    members = {**PETS, "cat/bad.jpg": b"x", "dog/bad.jpg": b"", "readme.txt": b"y", "cat/.hidden": b""}
    (tmp_path / "out.csv").write_text("path,reason\ncat/bad.jpg,torn\nreadme.txt,\n")
    found, _ = curate(tmp_path, members, exclude="out.csv")
    assert found.rejected[["path", "reason"]].values.tolist() == [
        ["cat/.hidden", "hidden file"],
        ["cat/bad.jpg", "excluded: torn"],
        ["dog/bad.jpg", "empty file (0 bytes)"],
        ["readme.txt", "excluded"],
    ]
    rows = [f"{name},{('train', 'val', 'test')[i % 3]}" for i, name in enumerate([*sorted(PETS), "dog/bad.jpg"])]
    (tmp_path / "splits.csv").write_text("\n".join(["path,split", *rows]))
    found, _ = curate(tmp_path, members, exclude="out.csv", file="splits.csv")
    assert found.rejected[["path", "reason"]].values.tolist() == [
        ["cat/.hidden", "hidden file"],
        ["cat/bad.jpg", "not listed in split.file"],
        ["dog/bad.jpg", "empty file (0 bytes)"],
        ["readme.txt", "not listed in split.file"],
    ]
    assert found.rejected["bytes"].tolist() == [0, 1, 0, 1]
    require_mostly_accepted(len(found.images), found.rejected, 1 / 41)


def test_classes_are_those_of_the_listed_images(tmp_path):
    members = {**PETS, "fox/1.jpg": picture(300)}
    rows = [f"{name},{('train', 'val', 'test')[i % 3]}" for i, name in enumerate(sorted(PETS))]
    (tmp_path / "splits.csv").write_text("\n".join(["path,split", *rows]))
    found, divided = curate(tmp_path, members, file="splits.csv")
    assert found.classes == ("cat", "dog") and set(divided.manifest["label"]) == {"cat", "dog"}
    (tmp_path / "splits.csv").write_text("\n".join(["path,split", *rows[:20]]))
    assert "split.file = 'splits.csv' lists images of 1 classes" in told(tmp_path, members, file="splits.csv")
    (tmp_path / "splits.csv").write_text("\n".join(["path,split", *rows, "fox/1.jpg,train"]))
    members["fox/1.jpg"] = b""
    assert "class 'fox' has no usable image left of those in split.file = 'splits.csv'" in told(
        tmp_path, members, file="splits.csv"
    )


def test_images_to_predict_are_kept_apart(tmp_path):
    members = {f"train/{name.replace('/', '.')}": data for name, data in PETS.items()}
    members |= {f"test1/{i}.jpg": picture(500 + i) for i in range(1, 12)}
    found, divided = curate(tmp_path, members)
    assert found.rejected.empty and len(divided.manifest) == 40
    assert found.unlabelled.set_index("path")["bytes"].to_dict() == {
        name: len(data) for name, data in members.items() if name.startswith("test1")
    }


def test_folds(tmp_path):
    tested = []
    for fold in range(4):
        _, divided = curate(tmp_path, PETS, method="folds", folds=4, fold=fold, val=0.1)
        tested += [path for path, split in split_of(divided).items() if split == "test"]
    assert sorted(tested) == sorted(PETS)


def test_training_share_leaves_images_unused(tmp_path):
    _, divided = curate(tmp_path, PETS, train=10, val=10, test=10)
    assert divided.manifest["split"].value_counts().to_dict() == dict.fromkeys(("train", "val", "test", "unused"), 10)


def test_training_share_holds_for_given_splits_and_folds_too(tmp_path):
    members = {f"{('train', 'val', 'test', 'train')[i % 4]}/{name}": PETS[name] for i, name in enumerate(sorted(PETS))}
    _, divided = curate(tmp_path, members, train=8)
    assert divided.method == "given"
    assert divided.manifest["split"].value_counts().to_dict() == {"unused": 12, "val": 10, "test": 10, "train": 8}
    _, divided = curate(tmp_path, PETS, method="folds", folds=4, val=4, train=8)
    assert divided.manifest["split"].value_counts().to_dict() == {"unused": 18, "test": 10, "train": 8, "val": 4}


def test_given_split_that_is_not_there_is_told(tmp_path):
    assert "no folders train, val and test and split.file is not set" in told(tmp_path, method="given")


def test_class_whose_images_are_all_broken_is_told(tmp_path):
    assert "class 'fox' has no usable image" in told(tmp_path, {**PETS, "fox/1.jpg": b"", "fox/2.jpg": b"x"})


def test_order_of_members_changes_nothing_and_the_seed_does(tmp_path):
    _, one = curate(tmp_path, PETS)
    _, other = curate(tmp_path, dict(reversed(PETS.items())))
    pd.testing.assert_frame_equal(one.manifest, other.manifest)
    _, third = curate(tmp_path, PETS, seed=2)
    assert split_of(third) != split_of(one)


def test_exclusions_that_match_nothing_are_told(tmp_path):
    (tmp_path / "out.csv").write_text("path\ncat/3.jpg\n./cat/4.jpg\n")
    found, _ = curate(tmp_path, PETS, exclude="out.csv")
    assert found.warnings == ("1 of 2 rows of split.exclude = 'out.csv' match no image, './cat/4.jpg' for one",)
    (tmp_path / "out.csv").write_text("path\nPetImages/cat/3.jpg\n")
    assert "1 of 1 rows of split.exclude" in told(tmp_path, exclude="out.csv")


@pytest.mark.parametrize("parameter", ["file", "exclude"])
def test_list_in_a_home_folder_that_nobody_knows_is_told(tmp_path, parameter):
    said = told(tmp_path, **{parameter: "~no-such-user/list.csv"})
    assert said.startswith(f"split.{parameter} = '~no-such-user/list.csv' begins with a home folder")


def test_given_split_that_is_all_duplicates_is_told(tmp_path):
    members = {f"train/{name}": data for name, data in PETS.items()}
    members |= {f"{split}/cat/1.jpg": PETS["cat/1.jpg"] for split in ("val", "test")}
    assert "every image of the given val split" in told(tmp_path, members, method="given")


@pytest.mark.parametrize("method", ["random", "folds"])
def test_what_the_list_calls_unused_stays_so(tmp_path, method):
    rows = [f"{name},{'unused' if name.endswith('7.jpg') else 'Train'}" for name in sorted(PETS)]
    (tmp_path / "splits.csv").write_text("\n".join(["path, Split", *rows]))
    _, divided = curate(tmp_path, PETS, file="splits.csv", method=method)
    assert {name for name, split in split_of(divided).items() if split == "unused"} == {
        name for name in PETS if name.endswith("7.jpg")
    }
