"""The page on a data set: it tells the truth, carries everything inside itself, and is the same for the same data."""

import base64
import hashlib
import io
import re
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from catdog import data_page
from catdog.data_page import (
    choose_montage,
    choose_shown,
    contradiction_groups,
    draw_pictures,
    duplicate_groups,
    histogram,
    printable,
    render_page,
    split_class_counts,
    suffix_mismatches,
    write_data_page,
)
from catdog.images import ImageError
from catdog.plots import plot_picture_rows, shrink
from catdog.quality import REJECTED_COLUMNS, inspect

REPORT = {"leaks": 0}


def photo(seed: int, *, height=60, width=80, kind="PNG", **options) -> bytes:
    """A picture of soft random spots, different for each seed."""
    rng = np.random.default_rng(seed)
    spots = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    spots.resize((width, height), Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def table(files: dict[str, bytes], groups=None, splits=None) -> pd.DataFrame:
    """The manifest of these files; the label is the folder's name."""
    rows = [
        {"path": name, "label": name.rsplit("/", 1)[0], **asdict(inspect(data, max_pixels=1e6))}
        for name, data in files.items()
    ]
    return pd.DataFrame(rows).assign(
        group=range(len(files)) if groups is None else groups,
        split=["train", "val", "test"] * (len(files) // 3) + ["train"] * (len(files) % 3) if splits is None else splits,
    )


def refused(*rows) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=REJECTED_COLUMNS)


def pets(count=6) -> dict[str, bytes]:
    return {f"{'cat' if n % 2 else 'dog'}/{n}.png": photo(n) for n in range(count)}


class Page(HTMLParser):
    """What a reader gets to see of a page, and what it would load."""

    def __init__(self, text: str):
        super().__init__()
        self.source, self.tags, self.links, self.images, self.tables = text, set(), [], [], []
        self._text, self._open = [], []
        self.feed(text)
        self.text = " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        found = dict(attributes)
        if tag not in ("meta", "link", "img"):
            self._open.append(tag)
        self.links += [found[name] for name in ("src", "href", "srcset", "action", "data") if found.get(name)]
        if tag == "img":
            self.images.append(found)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if {"style", "title"} & set(self._open):
            return
        self._text.append(data)
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data.strip()

    def rows(self, heading: str) -> list[list[str]]:
        """The rows of the table whose first column has this heading."""
        (found,) = [table for table in self.tables if table[0][0] == heading]
        return found[1:]

    def pixels(self, number: int) -> np.ndarray:
        """A picture of the page, decoded."""
        head, _, data = self.images[number]["src"].partition(",")
        assert head == "data:image/jpeg;base64"
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def tile(page: Page, name: str) -> int | None:
    """The headline number above this name."""
    found = re.search(rf"<b>([\d,]+)</b><span>{name}</span>", page.source)
    return int(found[1].replace(",", "")) if found else None


def render(files, rejected=None, report=REPORT, manifest=None, more=None) -> Page:
    """The page on these files; `more` are those that only `rejected` names."""
    manifest = table(files) if manifest is None else manifest
    rejected = refused() if rejected is None else rejected
    shown = choose_shown(manifest, rejected, (files | (more or {})).__getitem__, max_pixels=1e6)
    return Page(render_page(shown, manifest, rejected, report))


def write(folder: Path, files, rejected=None, manifest=None) -> Page:
    """Writes the page on these files, with its pictures, and reads it again."""
    write_data_page(
        folder / "data.html",
        manifest=table(files) if manifest is None else manifest,
        rejected=refused() if rejected is None else rejected,
        report=REPORT,
        read=files.__getitem__,
        pictures=folder / "data",
    )
    return Page((folder / "data.html").read_text(encoding="utf-8"))


def test_headline_numbers_and_counts_are_those_of_the_tables():
    files = pets(12)
    manifest = table(files, groups=[0, 1, 0, *range(3, 12)], splits=["train"] * 7 + ["val"] * 2 + ["test"] * 3)
    rejected = refused(("cat/x.jpg", "cat", "not an image", 7), ("readme.txt", "", "hidden file", 1234))
    page = render(files, rejected, {"leaks": 0, "unlabelled": 1500, "ends_early": 2}, manifest=manifest)
    assert [tile(page, name) for name in ("images", "classes", "files rejected", "duplicate groups")] == [12, 2, 2, 1]
    assert [tile(page, name) for name in ("leaks between splits", "without a label", "end early")] == [0, 1500, 2]
    assert tile(page, "unused") is None
    assert [[row[0], *row[2:6]] for row in page.rows("class")] == [
        ["cat", "3", "1", "2", "6"],
        ["dog", "4", "1", "1", "6"],
    ]
    assert page.rows("file") == [
        ["cat/x.jpg", "cat", "not an image", "7"],
        ["readme.txt", "", "hidden file", "1,234"],
    ]
    assert sorted(page.rows("reason")) == [["hidden file", "1"], ["not an image", "1"]]
    assert "reports/rejected.csv" in page.text


def test_unused_images_are_counted_and_a_leak_is_marked():
    files = pets(8)
    splits = ["train", "val", "test", "train", "unused", "unused", "unused", "train"]
    page = render(files, report={"leaks": 4}, manifest=table(files, splits=splits))
    assert tile(page, "unused") == 3
    assert tile(page, "leaks between splits") == 4
    assert 'class="tile bad"' in page.source
    assert 'class="tile good"' in render(files).source
    assert [row[0:1] + row[2:7] for row in page.rows("class")] == [
        ["cat", "2", "1", "0", "1", "4"],
        ["dog", "1", "0", "1", "2", "4"],
    ]


def test_page_needs_nothing_but_itself():
    files = pets() | {"dog/copy.png": photo(0)}
    page = render(files, manifest=table(files, groups=[0, 1, 2, 3, 4, 5, 0]))
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert [link for link in page.links if not link.startswith(("data:image/jpeg;base64,", "#"))] == []
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert "@import" not in page.source
    for number in range(len(page.images)):
        assert page.pixels(number).shape[2] == 3
    targets = {link[1:] for link in page.links if link.startswith("#")}
    assert targets <= set(re.findall(r'id="([^"]+)"', page.source))


SCRIPT = """
import sys; sys.path[:0] = [sys.argv[1]]
from pathlib import Path
import test_data_page as t
t.write_many_kinds(Path(sys.argv[2]))
"""


def write_many_kinds(folder):
    """A page with something in every section."""
    files = pets(9) | {"dog/copy.png": photo(0), "cat/wrong.jpg": photo(50), "cat/grey.png": photo(51)}
    manifest = table(files, groups=[0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 10, 1], splits=["train", "unused", "val"] * 4)
    twice = {"cat/t.png": photo(90), "dog/t.png": photo(90)}
    rejected = refused(
        *((name, name[:3], "same picture under two labels", len(data)) for name, data in twice.items()),
        *((f"x{n}", "", f"reason {n % 25}", n) for n in range(60)),
    )
    write_data_page(
        folder / "data.html",
        manifest=manifest,
        rejected=rejected,
        report=REPORT,
        read=(files | twice).__getitem__,
        pictures=folder / "data",
    )


def contents(folder) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_data_gives_the_same_bytes_in_another_process(tmp_path):
    write_many_kinds(tmp_path / "here")
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(here), str(tmp_path / "there")],
        check=True,
        env={
            "PYTHONHASHSEED": "77",
            "PYTHONPATH": str(here.parent / "src"),
            "PATH": "/usr/bin:/bin",
            "TZ": "Asia/Tokyo",
        },
    )
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    assert set(contents(tmp_path / "here")) == {
        "data.html",
        *(
            f"data/{name}.png"
            for name in ("counts", "duplicates", "properties", "sizes", "montage-1-cat", "montage-2-dog")
        ),
    }


NASTY = [
    "<script>alert(1)</script>",
    "a\"onerror='x'&amp;",
    "$x^2$ and $y$",
    "$\\frac{",
    "line\nbreak\x00\x1b[31m",
    "\u202egnp.exe",
    "猫 Ä {{ 7*7 }} {% raw %}",
]


def test_names_from_the_data_cannot_change_the_page(tmp_path):
    files = {f"{label}/{label}{n}.png": photo(10 * n + k) for k, label in enumerate(NASTY) for n in range(2)}
    manifest = table(files, groups=np.arange(len(files)) // 2)
    manifest["label"] = [label for label in NASTY for _ in range(2)]
    rejected = refused(*((f"{label}.jpg", label, f"not an image: {label}", 1) for label in NASTY))
    page = write(tmp_path, files, rejected, manifest)
    assert "script" not in page.tags
    assert all(set(image) <= {"src", "width", "height", "alt", "title", "loading"} for image in page.images)
    assert "49" not in {row[0] for row in page.rows("class")}
    for sign in "\x00\x1b\u202e":
        assert sign not in page.source
    assert {row[0] for row in page.rows("class")} == {printable(label) for label in NASTY}
    drawn = sorted(path.name for path in (tmp_path / "data").glob("montage*"))
    assert len(drawn) == len(NASTY)
    assert all(re.fullmatch(r"montage-\d-[A-Za-z0-9_-]*\.png", name) for name in drawn)


def test_printable_keeps_what_can_be_read_and_escapes_the_rest():
    assert printable("猫 Ä-1.jpg") == "猫 Ä-1.jpg"
    assert printable("a\nb\u202ec\udce9") == "a\\nb\\u202ec\\udce9"
    assert printable(12) == "12"


def test_montage_shows_the_first_of_each_class_and_one_of_each_group():
    manifest = pd.DataFrame(
        {
            "path": [f"p{n}" for n in range(60)],
            "label": ["dog" if n % 3 else "cat" for n in range(60)],
            "group": [n if n > 7 else n % 3 for n in range(60)],
        }
    )
    chosen = choose_montage(manifest)
    assert list(chosen) == ["cat", "dog"]
    assert chosen["cat"][:3] == ["p0", "p9", "p12"]
    assert chosen["dog"][:4] == ["p1", "p2", "p8", "p10"]
    assert len(chosen["dog"]) == data_page.MONTAGE_PICTURES_OF_CLASS


@pytest.mark.parametrize(
    ("classes", "shown", "each"), [(2, 2, 24), (8, 8, 24), (37, 37, 5), (199, 199, 1), (500, 200, 1)]
)
def test_number_of_pictures_stays_bounded_whatever_the_number_of_classes(classes, shown, each):
    numbers = np.arange(classes * 30)
    manifest = pd.DataFrame(
        {"path": numbers.astype(str), "label": [f"class {n % classes:03d}" for n in numbers], "group": numbers}
    )
    chosen = choose_montage(manifest)
    assert len(chosen) == shown
    assert {len(paths) for paths in chosen.values()} == {each}


def test_few_classes_have_a_montage_each_and_many_have_one_together(tmp_path):
    def montages(count: int) -> list[str]:
        files = {f"class {n % count:02d}/{n}.png": photo(n) for n in range(2 * count)}
        manifest = table(files)
        draw_pictures(choose_shown(manifest, refused(), files.__getitem__, max_pixels=1e6), manifest, tmp_path)
        return sorted(path.name for path in tmp_path.glob("montage*"))

    assert montages(9) == ["montage.png"]
    assert montages(3) == ["montage-1-class_00.png", "montage-2-class_01.png", "montage-3-class_02.png"]
    assert montages(10) == ["montage.png"]


def test_pictures_of_the_page_are_those_of_the_class():
    plain = {}
    for number in range(6):
        color = (250, 10, 10) if number % 2 else (10, 10, 250)
        buffer = io.BytesIO()
        Image.new("RGB", (300 + number, 200), color).save(buffer, "PNG")
        plain[f"{'red' if number % 2 else 'blue'}/{number}.png"] = buffer.getvalue()
    page = render(plain)
    assert [image["title"] for image in page.images] == [f"blue/{n}.png" for n in (0, 2, 4)] + [
        f"red/{n}.png" for n in (1, 3, 5)
    ]
    for number in range(6):
        pixels = page.pixels(number)
        assert pixels.shape == (data_page.MONTAGE_SIDE, data_page.MONTAGE_SIDE, 3)
        assert pixels.mean(axis=(0, 1)).argmax() == (2 if number < 3 else 0)


def member_table(*rows) -> pd.DataFrame:
    columns = ["path", "label", "split", "group", "sha256", "perceptual_hash"]
    return pd.DataFrame(rows, columns=columns).assign(width=4, height=3, bytes=9)


def test_duplicate_groups_come_with_the_most_different_first():
    manifest = member_table(
        ("z/1", "cat", "train", 7, "aa", "00"),
        ("a/1", "cat", "train", 7, "aa", "00"),
        ("b/1", "cat", "val", 8, "bb", "0f"),
        ("b/2", "cat", "val", 8, "bc", "1e"),
        ("b/3", "cat", "val", 8, "bd", "2d"),
        ("c/1", "cat", "test", 9, "cc", "ff"),
        ("c/2", "cat", "test", 9, "cd", "ff"),
        ("d/1", "cat", "test", 10, "dd", "55"),
    )
    groups = duplicate_groups(manifest)
    assert [[member.path for member in group.members] for group in groups] == [
        ["b/1", "b/2", "b/3"],
        ["c/1", "c/2"],
        ["a/1", "z/1"],
    ]
    # 0f is 2 bits from each of the others, and they are 4 apart.
    assert [group.distance for group in groups] == [4, 0, 0]
    assert [group.is_one_file for group in groups] == [False, False, True]


def test_large_group_shows_what_differs():
    rows = [(f"a/{n:03d}", "cat", "train", 0, "aa", "00") for n in range(200)]
    rows += [("b/1", "cat", "train", 0, "bb", "01"), ("c/1", "cat", "train", 0, "cc", "03")]
    (group,) = duplicate_groups(member_table(*rows))
    assert len(group.members) == 202
    assert [member.path for member in group.shown] == ["a/000", "a/001", "b/1", "c/1"]
    assert group.distance == 2


def test_duplicates_stand_side_by_side_with_split_and_path():
    files = pets(4) | {"cat/copy.png": photo(1), "dog/small.jpg": photo(2, kind="JPEG", height=30, width=40)}
    manifest = table(files, groups=[0, 1, 2, 3, 1, 2], splits=["train", "test", "val", "train", "test", "val"])
    page = render(files, manifest=manifest)
    shown = page.text[page.text.index("perceptual hash.") :]
    near, exact = shown.index("dog/small.jpg"), shown.index("cat/copy.png")
    assert near < exact
    assert "the same file" in shown[near:exact]
    assert "alike" in shown[:near]
    assert "val dog/2.png" in shown
    assert "test cat/1.png 80 x 60" in shown
    assert "no two images" not in page.text.lower()
    assert "No two images show the same." in render(pets(4)).text


def test_contradictions_find_their_partners_again():
    files = pets(4)
    twice = {
        "cat/a.png": photo(70),
        "dog/a.png": photo(70),
        "cat/b.png": photo(71, height=200, width=260),
        "dog/b.jpg": photo(71, height=200, width=260, kind="JPEG", quality=97),
        "cat/alone.png": photo(72),
    }
    rows = [(name, name[:3], "same picture under two labels", len(data)) for name, data in twice.items()]
    rejected = refused(("cat/0.jpg", "cat", "empty file (0 bytes)", 0), *rows)
    asked = []

    def read(name):
        asked.append(name)
        return twice[name]

    groups = contradiction_groups(rejected, read, max_pixels=1e6)
    assert sorted(sorted(member.path for member in group.members) for group in groups) == [
        ["cat/a.png", "dog/a.png"],
        ["cat/b.png", "dog/b.jpg"],
    ]
    assert sorted(asked) == sorted(twice)
    page = render(files, rejected, more=twice)
    assert "The same picture under two labels" in page.text
    assert {"cat/a.png", "dog/a.png", "cat/b.png", "dog/b.jpg"} <= {image["alt"] for image in page.images}
    assert "cat/alone.png" not in {image["alt"] for image in page.images}
    assert "The same picture under two labels" not in render(files).text


def test_of_many_contradictions_whole_groups_are_read(monkeypatch):
    monkeypatch.setattr(data_page, "CONTRADICTIONS_READ", 6)
    data = {n: photo(n, height=40 + n) for n in range(10)}
    rows = [
        (f"{label}/{n}.png", label, "same picture under two labels", len(data[n]))
        for label in ("cat", "dog")
        for n in data
    ]
    groups = contradiction_groups(refused(*rows), lambda name: data[int(name[4:-4])], max_pixels=1e6)
    assert len(groups) == 3


def test_blank_pictures_of_two_labels_are_not_one_picture():
    def blank(shade):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30), (shade, shade, shade)).save(buffer, "PNG")
        return buffer.getvalue()

    data = {"cat/1.png": blank(0), "dog/1.png": blank(255), "cat/2.png": blank(9), "dog/2.png": blank(9)}
    rows = [(name, name[:3], "same picture under two labels", len(content)) for name, content in data.items()]
    (group,) = contradiction_groups(refused(*rows), data.__getitem__, max_pixels=1e6)
    assert [member.path for member in group.members] == ["cat/2.png", "dog/2.png"]


def test_suffix_that_does_not_match_the_format_is_counted():
    names = {
        "a/1.jpg": "JPEG", "a/2.JPEG": "JPEG", "a/3.jpg": "PNG", "a/4.png": "PNG", "a/5.PNG": "JPEG",
        "a/6": "GIF", "a/7.gif": "GIF", "a/8.tif": "TIFF", "a/9.xyz": "NEW", "a/10.jpg": "MPO",
    }  # fmt: skip
    manifest = pd.DataFrame({"path": list(names), "format": list(names.values())})
    assert suffix_mismatches(manifest)["path"].tolist() == ["a/3.jpg", "a/5.PNG", "a/6"]
    page = render({"cat/1.jpg": photo(1), "dog/2.png": photo(2), "dog/3.jpg": photo(3, kind="JPEG")})
    assert [row[0:1] + row[-2:] for row in page.rows("format")] == [["PNG", "2", "1"], ["JPEG", "1", ""]]
    assert "cat/1.jpg is PNG" in page.text


def test_formats_and_modes_are_counted():
    grey = Image.new("L", (20, 20))
    grey.putpixel((3, 3), 200)
    buffer = io.BytesIO()
    grey.save(buffer, "PNG")
    page = render(pets(4) | {"cat/grey.png": buffer.getvalue()})
    assert ["format", "RGB", "L", "all", "under another suffix"] in [table[0] for table in page.tables]
    assert page.rows("format") == [["PNG", "4", "1", "5", ""]]


def test_histogram_counts_every_value_once():
    rng = np.random.default_rng(0)
    values = pd.Series(rng.normal(100, 10, 5000))
    values.iloc[0] = 1e9
    found = histogram(values)
    assert sum(bar["count"] for bar in found["bars"]) == 5000
    assert found["high"] < 200
    assert found["bars"][-1]["count"] >= 25
    assert max(bar["height"] for bar in found["bars"]) == 1
    middle = found["bars"][20]
    assert middle["count"] == ((values >= middle["from"]) & (values < middle["to"])).sum()
    assert found["median"] == np.median(values)


def test_histogram_of_equal_values_and_of_a_given_range():
    equal = histogram(pd.Series([7.0, 7.0]))
    assert sum(bar["count"] for bar in equal["bars"]) == 2
    assert equal["low"] < 7 < equal["high"]
    given = histogram(pd.Series([-5, 0.1, 254.9, 300]), low=0, high=255)
    assert (given["bars"][0]["count"], given["bars"][-1]["count"]) == (2, 2)


def test_long_table_of_rejected_files_is_cut_but_its_reasons_are_not():
    rows = [(f"x/{n:04d}.jpg", "x", f"reason {n % 30}", n) for n in range(900)]
    page = render(pets(4), refused(*rows))
    assert len(page.rows("file")) == data_page.REJECTED_SHOWN
    reasons = page.rows("reason")
    assert sum(int(row[1]) for row in reasons) == 900
    assert reasons[-1] == ["10 other reasons", "300"]
    assert "No file was rejected." in render(pets(4)).text


def test_split_counts_have_every_class_in_every_split():
    manifest = pd.DataFrame({"label": ["b", "a", "a"], "split": ["train", "train", "test"]})
    assert split_class_counts(manifest) == {
        "train": {"a": 1, "b": 1},
        "val": {"a": 0, "b": 0},
        "test": {"a": 1, "b": 0},
    }
    manifest.loc[3] = ["a", "unused"]
    assert list(split_class_counts(manifest)) == ["train", "val", "test", "unused"]
    assert split_class_counts(manifest)["unused"] == {"a": 1, "b": 0}
    letters = pd.DataFrame({"label": [*"hgfedcba"], "split": "train"})
    assert [*split_class_counts(letters)["val"]] == [*"abcdefgh"]


def test_failure_leaves_no_page(tmp_path):
    files = pets(4)
    manifest = table(files)
    files["cat/1.png"] = b"no picture"
    with pytest.raises(ImageError):
        write(tmp_path, files, manifest=manifest)
    assert not [*tmp_path.rglob("data.html*")]


def test_many_images_cost_few_reads_and_a_small_page():
    rng = np.random.default_rng(0)
    count, shown = 25_000, [photo(n, height=150, width=200, kind="JPEG") for n in range(40)]
    manifest = table({f"{n}/x.jpg": data for n, data in enumerate(shown)})
    manifest = manifest.iloc[np.arange(count) % 40].reset_index(drop=True)
    manifest["path"] = [f"train/{n}.jpg" for n in range(count)]
    manifest["label"] = [f"class {n % 37:02d}" for n in range(count)]
    manifest["group"] = np.where(rng.random(count) < 0.3, rng.integers(0, 3000, count), np.arange(count))
    asked = []

    def read(name):
        asked.append(name)
        return shown[len(asked) % 40]

    page = render_page(choose_shown(manifest, refused(), read, max_pixels=1e6), manifest, refused(), REPORT)
    assert len(asked) <= data_page.MONTAGE_PICTURES + data_page.GROUPS_SHOWN * data_page.MEMBERS_SHOWN
    assert len(page) < 3e6


def test_rows_of_pictures_are_drawn_pixel_by_pixel(tmp_path):
    colors = [(200, 30, 40), (30, 200, 40), (30, 40, 200)]
    pictures = [np.full((50, 70, 3), color, np.uint8) for color in colors]
    plot_picture_rows([("one", pictures[:2]), ("two\nlines $", pictures[2:])], tmp_path / "x.png", title="t", side=70)
    image = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    boxes = []
    for color in colors:
        rows, columns = np.nonzero((image == color).all(axis=2))
        assert len(rows) == 50 * 70
        boxes.append((rows.min(), columns.min()))
    assert boxes[0][0] == boxes[1][0] < boxes[2][0]
    assert boxes[0][1] == boxes[2][1] < boxes[1][1]
    plot_picture_rows([], tmp_path / "none.png", title="nothing")
    assert Image.open(tmp_path / "none.png").size[1] < 100


@pytest.mark.parametrize(("shape", "small"), [((400, 200), (100, 50)), ((20, 30), (20, 30)), ((1, 5000), (1, 100))])
def test_shrinking_keeps_the_aspect_and_never_enlarges(shape, small):
    pixels = np.full((*shape, 3), 77, np.uint8)
    assert shrink(pixels, 100).shape == (*small, 3)
    assert (shrink(pixels, 100) == 77).all()
