"""The table of published data sets: whole, and with the right class for every member."""

import pytest

from catdog.catalog import PUBLISHED, is_named


@pytest.mark.parametrize("one", PUBLISHED.values(), ids=PUBLISHED)
def test_entry_is_whole(one):
    assert PUBLISHED[one.name] is one and is_named(one.name)
    assert len(one.sha256) == 64 and int(one.sha256, 16) and one.bytes > 1e8 and one.license
    assert len(one.urls) >= 2 and all(url.startswith("https://") for url in one.urls)


@pytest.mark.parametrize(
    ("member", "breed", "species"),
    [
        ("images/Maine_Coon_12.jpg", "Maine_Coon/Maine_Coon_12.jpg", "cat/Maine_Coon_12.jpg"),
        ("images/staffordshire_bull_terrier_7.jpg", "staffordshire_bull_terrier/{}", "dog/{}"),
        ("images/Abyssinian_100.mat", "Abyssinian/{}", "cat/{}"),
        ("images/", None, None),
        ("images/notes.txt", "images/notes.txt", "images/notes.txt"),
    ],
)
def test_oxford_pets_come_into_the_folder_of_their_class(member, breed, species):
    name = member.rpartition("/")[2]
    expected = {"oxford_pets:breeds": breed, "oxford_pets": species}
    for dataset, path in expected.items():
        rename = PUBLISHED[dataset].rename
        assert rename is not None and rename(member) == (path and path.format(name))


@pytest.mark.parametrize(
    ("dataset", "named"), [("sample", True), ("tfds:beans", True), ("./sample", False), ("x", False)]
)
def test_names_and_paths_are_told_apart(dataset, named):
    assert is_named(dataset) is named
