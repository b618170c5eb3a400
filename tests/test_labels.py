"""Which class each file of an archive has, read from nothing but the names."""

import pytest

from catdog.errors import CatdogError
from catdog.labels import SPLIT_NAMES, label_by_table, label_files
from catdog.names import IMAGE_SUFFIXES, is_hidden

FOLDERS = ["Cat/0.jpg", "Cat/1.jpg", "Dog/0.jpg"]


def message(names):
    with pytest.raises(CatdogError) as caught:
        label_files(names)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_folder_a_class():
    found = label_files(FOLDERS)
    assert found.classes == ("Cat", "Dog")
    assert found.labels == {"Cat/0.jpg": "Cat", "Cat/1.jpg": "Cat", "Dog/0.jpg": "Dog"}
    assert found.refused == {}


@pytest.mark.parametrize("top", ["PetImages/", "a/b/c/", "data set/ümlaut/"])
def test_single_top_folders_only_wrap(top):
    names = [top, *(top + name for name in FOLDERS), top + "Cat/", top + "Dog/"]
    found = label_files(names)
    assert found.classes == ("Cat", "Dog")
    assert found.labels == {top + name: name.split("/")[0] for name in FOLDERS}


def test_files_beside_the_wrapping_folder_have_no_class():
    found = label_files([f"PetImages/{name}" for name in FOLDERS] + ["readme.txt", "cover.jpg", "PetImages/x.jpg"])
    assert found.classes == ("Cat", "Dog")
    assert found.refused == dict.fromkeys(["readme.txt", "cover.jpg", "PetImages/x.jpg"], "outside any class folder")


def test_folders_inside_a_class_belong_to_it():
    found = label_files(["cat/indoor/1.jpg", "cat/2.jpg", "dog/a/b/3.jpg", "dog/a/c/4.jpg"])
    assert found.labels == {
        "cat/indoor/1.jpg": "cat",
        "cat/2.jpg": "cat",
        "dog/a/b/3.jpg": "dog",
        "dog/a/c/4.jpg": "dog",
    }


def test_files_of_other_kinds_in_a_class_folder_are_kept_for_the_inspection():
    found = label_files([*FOLDERS, "Cat/index.db", "Dog/notes"])
    assert found.labels["Cat/index.db"] == "Cat"
    assert found.labels["Dog/notes"] == "Dog"


def test_kaggle_names():
    found = label_files(["train/", "train/cat.0.jpg", "train/cat.12499.jpg", "train/dog.7.JPG"])
    assert found.classes == ("cat", "dog")
    assert found.labels == {"train/cat.0.jpg": "cat", "train/cat.12499.jpg": "cat", "train/dog.7.JPG": "dog"}


def test_kaggle_names_in_split_folders_are_classes_not_splits():
    names = [
        f"{split}/{name}s/{name}.{n}.jpg" for split in ("train", "validation") for name in ("cat", "dog") for n in "12"
    ]
    found = label_files(names)
    assert found.classes == ("cat", "dog")
    assert len(found.labels) == len(names)


def test_other_names_among_kaggle_names_have_no_class():
    found = label_files(["cat.1.jpg", "cat.2.jpg", "dog.1.jpg", "dog.2.jpg", "cover.jpg", "dog.x.jpg"])
    assert found.refused == dict.fromkeys(["cover.jpg", "dog.x.jpg"], "no class in its name")


def test_few_names_with_a_number_do_not_make_kaggle_names():
    found = label_files([*FOLDERS, "Dog/holiday.1.jpg"])
    assert found.labels["Dog/holiday.1.jpg"] == "Dog"
    assert found.classes == ("Cat", "Dog")


def test_numbered_logs_do_not_make_kaggle_names():
    found = label_files([*FOLDERS, "log.1.txt", "log.2.txt", "log.3.txt"])
    assert found.classes == ("Cat", "Dog")


def test_numbered_names_without_a_class_leave_the_class_to_the_folders():
    names = ["Cat/img.1.jpg", "Cat/img.2.jpg", "Dog/img.3.jpg", "Dog/img.4.jpg"]
    assert label_files(names).labels == {name: name.split("/")[0] for name in names}


SOURCES = ["Cat/flickr.1.jpg", "Cat/google.2.jpg", "Dog/flickr.3.jpg"]


@pytest.mark.parametrize("layout", ["{}", "pets/{}", "train/{}", "pets/train/{}"])
@pytest.mark.parametrize("names", [SOURCES, ["1/cat.0.jpg", "1/dog.0.jpg", "2/cat.1.jpg", "2/dog.1.jpg"]])
def test_names_that_occur_in_several_folders_may_be_the_class_or_not(layout, names):
    names = [layout.format(name) for name in names]
    with pytest.raises(CatdogError, match="their class may be the folder, or the name") as stopped:
        label_files([*names, layout.format("cover.1.jpg")])
    assert f"as {names[0]!r} and {names[2]!r}" in str(stopped.value)
    # As the last words of the sentence say.
    table = {name: name.split("/")[-2] for name in names}
    assert label_by_table(names, table).labels == table


def test_names_that_occur_in_several_folders_below_folders_of_splits_may_be_the_class_or_not():
    with pytest.raises(CatdogError, match="their class may be the folder, or the name"):
        label_files([f"{split}/{name}" for split in ("train", "test") for name in SOURCES])


@pytest.mark.parametrize("others", [["extra/cat.5.jpg", "more/cat.6.jpg"], ["unlabelled/cat.5.jpg", "test/cat.6.jpg"]])
def test_kaggle_names_of_which_most_lie_in_no_class_folder_are_the_classes(others):
    names = [f"train/{label}.{i}.jpg" for label in ("cat", "dog") for i in range(3)]
    found = label_files([*names, *others])
    assert found.classes == ("cat", "dog")


@pytest.mark.parametrize("name", ["__MACOSX/Cat/._0.jpg", "Cat/.DS_Store", ".cache/x.jpg", "Dog/.hidden/1.jpg"])
def test_hidden_files_have_no_class_and_say_so(name):
    found = label_files([*FOLDERS, name])
    assert found.refused == {name: "hidden file"}
    assert found.classes == ("Cat", "Dog")


def test_hidden_folders_are_no_classes_even_when_empty():
    assert label_files([*FOLDERS, "__MACOSX/", ".git/", "__MACOSX/Cat/"]).classes == ("Cat", "Dog")


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("a/b.jpg", False),
        ("a/.b.jpg", True),
        (".a/b.jpg", True),
        ("x/__MACOSX/b", True),
        ("a..b", False),
        ("a/Thumbs.db", True),
        ("desktop.ini", True),
    ],
)
def test_what_counts_as_hidden(name, hidden):
    assert is_hidden(name) is hidden


def test_names_of_any_script():
    found = label_files(["Köter/1.jpg", "猫/画像.png", "собака/фото.jpeg"])
    assert found.classes == ("Köter", "собака", "猫")
    assert found.labels["猫/画像.png"] == "猫"


def test_classes_are_sorted_and_told_apart_by_case():
    assert label_files(["b/1.jpg", "a/1.jpg", "B/1.jpg"]).classes == ("B", "a", "b")


def test_order_of_the_names_does_not_matter():
    names = [*FOLDERS, "x.jpg", ".y.jpg"]
    assert label_files(names) == label_files(reversed(names)) == label_files(iter(names))


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_suffixes_count_in_any_case(suffix):
    assert label_files([f"a/1{suffix}", f"b/1{suffix.upper()}"]).classes == ("a", "b")


@pytest.mark.parametrize("extra", ["bird/", "bird/readme.txt", "bird/.keep", "bird/sub/"])
@pytest.mark.parametrize("top", ["", "data/"])
def test_class_folder_without_images_is_named(extra, top):
    if extra == "bird/.keep":
        extra = "bird/"  # a hidden file does not fill a folder
    names = [top + name for name in [*FOLDERS, extra]]
    assert message(names) == "class folder 'bird' holds no images; fill it or remove it"


def test_empty_folder_is_named_also_when_one_class_is_left():
    assert "'Dog' holds no images" in message(["PetImages/Cat/1.jpg", "PetImages/Dog/"])


@pytest.mark.parametrize("names", [["cat/1.jpg", "cat/2.jpg"], ["data/cat/1.jpg"], ["cat.1.jpg", "cat.2.jpg"]])
def test_one_class_is_too_few(names):
    assert "only the class 'cat'" in message(names)


def test_no_folder_is_too_few():
    assert "no class folder" in message(["1.jpg", "2.jpg"])


@pytest.mark.parametrize("splits", [("train", "test"), ("Train", "VALID"), ("training", "validation", "testing")])
def test_splits_are_no_classes(splits):
    told = message([f"data/{split}/{name}" for split in splits for name in ("1.jpg", "2.jpg")])
    assert "are splits, and hold no class folders" in told
    assert all(split in told for split in splits)


def test_one_name_like_a_split_among_classes_is_a_class():
    assert label_files(["train/1.jpg", "bus/1.jpg"]).classes == ("bus", "train")


@pytest.mark.parametrize("names", [[], ["Cat/", "Dog/"], ["Cat/1.txt", "Dog/2.pdf"], [".a.jpg", "__MACOSX/Cat/1.jpg"]])
def test_no_images_at_all(names):
    files = sum(not name.endswith("/") for name in names)
    assert f"no image files among its {files} files" in message(names)


GIVEN = [f"{split}/{name}" for split in ("train", "validation", "Testing") for name in FOLDERS]


@pytest.mark.parametrize("top", ["", "pets/", "a/b/"])
def test_folders_of_splits_above_the_classes_give_the_split(top):
    found = label_files([top + name for name in GIVEN] + [f"{top}train/cover.jpg"])
    assert found.classes == ("Cat", "Dog")
    for name in GIVEN:
        split, label, _ = name.split("/")
        assert found.labels[top + name] == label
        assert found.splits[top + name] == {"validation": "val", "Testing": "test"}.get(split, split)
    assert found.refused == {f"{top}train/cover.jpg": "outside any class folder"}


def test_class_folder_that_is_empty_in_one_split_only_is_fine_and_in_all_is_named():
    assert label_files([*GIVEN, "train/Fox/", "validation/Fox/1.jpg"]).classes == ("Cat", "Dog", "Fox")
    assert "'Fox' holds no images" in message([*GIVEN, "train/Fox/", "validation/Fox/"])


def test_one_split_folder_is_no_split():
    assert label_files([f"train/{name}" for name in FOLDERS]).splits == {}


def test_kaggle_names_below_folders_of_splits_give_the_split():
    found = label_files(["train/cat.1.jpg", "train/dog.1.jpg", "val/cat.2.jpg", "val/dog.2.jpg"])
    assert found.splits == {name: name.split("/")[0] for name in found.labels}


def test_numbers_beside_kaggle_names_are_images_to_predict():
    train = [f"train/{label}.{i}.jpg" for label in ("cat", "dog") for i in range(3)]
    test = [f"test1/{i}.jpg" for i in range(1, 40)]
    found = label_files([*train, *test, "test1/", "sampleSubmission.csv", "test1/x.txt"])
    assert sorted(found.labels) == sorted(train) and found.splits == {}
    assert found.unlabelled == tuple(sorted(test))
    assert found.refused == {"sampleSubmission.csv": "no class in its name", "test1/x.txt": "no class in its name"}


def test_label_of_other_files_only_is_no_class():
    found = label_files(["cat.1.jpg", "dog.1.jpg", "fox.1.txt"])
    assert found.classes == ("cat", "dog") and found.refused == {"fox.1.txt": "no class in its name"}


def test_number_in_a_folder_of_labelled_images_is_a_stray_file_not_one_to_predict():
    found = label_files(["cat.1.jpg", "cat.2.jpg", "dog.1.jpg", "dog.2.jpg", "7.jpg"])
    assert found.unlabelled == () and found.refused == {"7.jpg": "no class in its name"}


@pytest.mark.parametrize("folder", ["unlabelled", "Unlabeled"])
def test_folder_for_unlabelled_images(folder):
    found = label_files([*FOLDERS, f"{folder}/1.jpg", f"{folder}/b/2.png", f"{folder}/notes.txt"])
    assert found.classes == ("Cat", "Dog")
    assert found.unlabelled == (f"{folder}/1.jpg", f"{folder}/b/2.png")
    assert found.refused == {f"{folder}/notes.txt": "outside any class folder"}


def test_test_folder_without_classes_holds_images_to_predict():
    found = label_files([f"train/{name}" for name in FOLDERS] + ["test/1.jpg", "test/2.jpg"])
    assert found.classes == ("Cat", "Dog") and found.splits == {}
    assert found.unlabelled == ("test/1.jpg", "test/2.jpg")


@pytest.mark.parametrize("names", [GIVEN, [*GIVEN, "train/.x", "a.txt", "unlabelled/1.jpg", "train/2.jpg", "Cat/"]])
def test_every_file_is_in_exactly_one_place(names):
    found = label_files(names)
    files = [name for name in names if not name.endswith("/")]
    assert sorted([*found.labels, *found.unlabelled, *found.refused]) == sorted(files)
    assert found.splits.keys() <= found.labels.keys()


def test_table_gives_the_classes():
    found = label_by_table(["a/1.jpg", "2.jpg", "x/", "3.jpg", ".h"], {"a/1.jpg": "owl", "2.jpg": "elk", "gone": "elk"})
    assert found.classes == ("elk", "owl")
    assert found.labels == {"a/1.jpg": "owl", "2.jpg": "elk"}
    assert found.refused == {"3.jpg": "not listed in split.file", ".h": "hidden file"}
    with pytest.raises(CatdogError, match="names 1 classes"):
        label_by_table(["1.jpg"], {"1.jpg": "owl"})


@pytest.mark.parametrize("layout", ["{}/{}s/{}.1.jpg", "{}/{}s/1{}.jpg"])
@pytest.mark.parametrize("folders", [("train", "validation", "test"), ("training_set", "test_set")])
def test_published_tutorial_layouts_keep_their_split(layout, folders):
    names = [f"set/{layout.format(split, label, label)}" for split in folders for label in ("cat", "dog")]
    found = label_files(names)
    assert len(found.classes) == 2 and found.labels.keys() == set(names)
    assert found.splits == {name: SPLIT_NAMES[name.split("/")[1]] for name in names}


def test_split_folder_that_is_repeated_only_wraps():
    names = [f"{s}/{s}/{k}/1.jpg" for s in ("training_set", "test_set") for k in ("cats", "dogs")]
    found = label_files(names)
    assert found.classes == ("cats", "dogs")
    assert found.splits == {n: "train" if n.startswith("training") else "test" for n in names}


@pytest.mark.parametrize("other", ["eval/Cat/1.jpg", "single_prediction/1.jpg"])
def test_something_beside_folders_of_splits_is_told_and_makes_no_class(other):
    told = message([*(f"train/{name}" for name in FOLDERS), *(f"test/{name}" for name in FOLDERS), other])
    assert f"looks like a split, with class folders in it, but {other.split('/')[0]!r} stands beside it" in told


def test_unknown_is_what_kaggle_calls_images_to_predict():
    found = label_files([*(f"train/{name}" for name in FOLDERS), "test/unknown/1.jpg", "test/unknown/2.jpg"])
    assert found.classes == ("Cat", "Dog")
    assert found.unlabelled == ("test/unknown/1.jpg", "test/unknown/2.jpg")


def test_table_leaves_images_to_predict_alone():
    names = ["train/1.jpg", "train/2.jpg", "test/3.jpg", "unlabelled/4.png", "test/notes.txt", "train/5.jpg"]
    found = label_by_table(names, {"train/1.jpg": "owl", "train/2.jpg": "elk"})
    assert found.unlabelled == ("test/3.jpg", "unlabelled/4.png")
    assert sorted(found.refused) == ["test/notes.txt", "train/5.jpg"]
