"""The report on a data set: one page that opens anywhere, and the same pictures as PNG files.

`reports/data.html` carries its style and pictures inside itself, has no script, and asks no server. Its bytes depend
on nothing but the data. The layout is in `templates/data.html.jinja`; this module works out what it shows.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from catdog.files import written_aside
from catdog.images import MAX_PIXELS, Pixels, decode, encode_jpeg, resize
from catdog.pages import data_uri, load_template, printable
from catdog.parallel import processors
from catdog.paths import REJECTED, SPLITS, UNUSED
from catdog.plots import plot_class_counts, plot_picture_rows, plot_properties, plot_sizes, shrink
from catdog.quality import inspect

ReadFile = Callable[[str], bytes]
"""Gives the bytes of a member of the raw archive; called from several threads."""

CONTRADICTION = "same picture under two labels"
"""How the reason begins for which `split.reject_contradictions` rejects."""

MONTAGE_PICTURES = 200  # in all classes together
MONTAGE_PICTURES_OF_CLASS = 24
MONTAGE_SIDE = 144  # pixels; on the page at most, and in the PNG files
CLASSES_WITH_OWN_MONTAGE = 8
PAIR_SIDE = 200  # pixels, of pictures side by side
GROUPS_SHOWN = 24
GROUPS_DRAWN = 12  # in duplicates.png
MEMBERS_SHOWN = 4
CONTRADICTIONS_READ = 400  # files; finding which belong together means decoding them
REJECTED_SHOWN = 200
REASONS_SHOWN = 20
EXAMPLES_SHOWN = 10
HISTOGRAM_BARS = 40
_JPEG_QUALITY = 75

# Which suffixes a format's files usually have. What is not listed has no usual one.
SUFFIXES: Mapping[str, frozenset[str]] = {
    "JPEG": frozenset({".jpg", ".jpeg", ".jpe", ".jfif"}),
    "MPO": frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"}),
    "PNG": frozenset({".png"}),
    "BMP": frozenset({".bmp", ".dib"}),
    "DIB": frozenset({".bmp", ".dib"}),
    "GIF": frozenset({".gif"}),
    "WEBP": frozenset({".webp"}),
    "TIFF": frozenset({".tif", ".tiff"}),
    "PPM": frozenset({".ppm", ".pgm", ".pbm", ".pnm"}),
    "AVIF": frozenset({".avif"}),
}


def write_data_page(
    path: Path,
    *,
    manifest: pd.DataFrame,
    rejected: pd.DataFrame,
    report: Mapping[str, Any],
    read: ReadFile,
    pictures: Path,
    max_pixels: float = MAX_PIXELS,
) -> None:
    """Writes the page, and its pictures as PNG files: counts, sizes, properties, duplicates and montages.

    Args:
        path: the page, e.g. reports/data.html; it appears whole or not at all.
        manifest: the accepted images: path, label, width, height, bytes, sha256, perceptual_hash, format, mode,
            brightness (mean grey, 0..255), note, group (the same for images that belong together) and split. The
            montages show the first of each class, so its order should be a drawn one (`split.draw_order`).
        rejected: the other files: path, label, reason, bytes.
        report: the stage's report; `leaks` (a number) is shown, and so are `method`, `unlabelled` and `ends_early`
            where it holds them.
        read: gives the bytes of a file.
        pictures: folder of the PNG files; montages of an earlier run are removed from it.
        max_pixels: as the images were accepted with.

    Raises:
        images.ImageError: a file of the manifest is no picture any more.
    """

    shown = choose_shown(manifest, rejected, read, max_pixels=max_pixels)
    draw_pictures(shown, manifest, pictures)
    with written_aside(path) as aside:
        aside.write_bytes(render_page(shown, manifest, rejected, report).encode())


@dataclass(frozen=True)
class Member:
    """A file of a group."""

    path: str
    label: str
    split: str  # "" for a rejected file
    width: int  # pixels
    height: int
    bytes: int
    sha256: str
    perceptual_hash: str  # hexadecimal


@dataclass(frozen=True)
class Group:
    """Files that show the same."""

    members: tuple[Member, ...]  # by path

    @property
    def shown(self) -> tuple[Member, ...]:
        """The members to show side by side: other labels and contents before repetitions."""
        seen: set[str] = set()
        news = {}
        for member in self.members:
            news[member.path] = (member.label not in seen) + (member.sha256 not in seen)
            seen |= {member.label, member.sha256}
        chosen = sorted(self.members, key=lambda member: -news[member.path])[:MEMBERS_SHOWN]
        return tuple(sorted(chosen, key=lambda member: member.path))

    @property
    def is_one_file(self) -> bool:
        """Whether all members have the same bytes."""
        return len({member.sha256 for member in self.members}) == 1

    @functools.cached_property
    def distance(self) -> int:
        """Bits between the perceptual hashes of the two members that differ most."""
        hashes = [int(text, 16) for text in sorted({member.perceptual_hash for member in self.members})]
        # Thousands, e.g. of nearly blank pictures, are compared with the first of them only.
        others = hashes if len(hashes) <= 100 else hashes[:1]
        return max((one ^ other).bit_count() for one in hashes for other in others)


@dataclass(frozen=True)
class Shown:
    """What the page and the PNG files show of the pictures themselves."""

    montage: Mapping[str, Sequence[str]]  # paths by class
    squares: Mapping[str, Pixels]  # the montage's pictures by path, MONTAGE_SIDE or fewer pixels a side
    duplicates: Sequence[Group]  # all of them
    contradictions: Sequence[Group]
    pairs: Mapping[str, Pixels]  # by path: of the groups that are shown, PAIR_SIDE pixels or fewer a side


def choose_shown(manifest: pd.DataFrame, rejected: pd.DataFrame, read: ReadFile, *, max_pixels: float) -> Shown:
    """Chooses the pictures to show and decodes them: a few hundred, whatever the number of images.

    The arguments, and what is raised, are those of `write_data_page`.
    """

    def load(names: Sequence[str], make_small: Callable[[Pixels], Pixels]) -> dict[str, Pixels]:
        # Made small at once, because the originals together do not fit into memory.
        with _pool() as pool:
            pictures = pool.map(lambda name: make_small(decode(read(name), max_pixels=max_pixels)), names)
            return dict(zip(names, pictures, strict=True))

    montage = choose_montage(manifest)
    duplicates = duplicate_groups(manifest)
    contradictions = contradiction_groups(rejected, read, max_pixels=max_pixels)
    side_by_side = [*duplicates[:GROUPS_SHOWN], *contradictions[:GROUPS_SHOWN]]
    return Shown(
        montage,
        load([name for names in montage.values() for name in names], _square),
        duplicates,
        contradictions,
        load([member.path for group in side_by_side for member in group.shown], lambda one: shrink(one, PAIR_SIDE)),
    )


def render_page(shown: Shown, manifest: pd.DataFrame, rejected: pd.DataFrame, report: Mapping[str, Any]) -> str:
    """Returns the page as HTML; the arguments are those of `write_data_page`."""
    counts = split_class_counts(manifest)
    contradicted_files = int(rejected["reason"].str.startswith(CONTRADICTION).sum())
    complete = contradicted_files <= CONTRADICTIONS_READ and len(shown.contradictions) <= GROUPS_SHOWN
    return str(
        load_template("data.html.jinja").render(
            tiles=_tiles(manifest, rejected, report, shown.duplicates),
            method=report.get("method", ""),
            splits=list(counts),
            classes=_class_rows(manifest, counts),
            histograms=_histograms(manifest),
            spread=_spread(manifest),
            formats=_format_table(manifest),
            mismatches=_mismatch_facts(manifest),
            montages=[
                {
                    "name": name,
                    "shown": [_data_uri(shown.squares[one]) for one in names],
                    "paths": names,
                    "count": sum(row[name] for row in counts.values()),
                }
                for name, names in shown.montage.items()
            ],
            own_montage=CLASSES_WITH_OWN_MONTAGE,
            groups=[_group_facts(group, shown.pairs) for group in shown.duplicates[:GROUPS_SHOWN]],
            group_count=len(shown.duplicates),
            contradictions=[_group_facts(group, shown.pairs) for group in shown.contradictions[:GROUPS_SHOWN]],
            contradicted_files=contradicted_files,
            contradictions_complete=complete,
            reasons=_reason_counts(rejected),
            rejected=rejected.head(REJECTED_SHOWN).to_dict("records"),
            rejected_count=len(rejected),
            rejected_file=REJECTED.as_posix(),
        )
    )


def draw_pictures(shown: Shown, manifest: pd.DataFrame, folder: Path) -> None:
    """Writes the PNG files; the arguments are those of `write_data_page`."""
    plot_class_counts(split_class_counts(manifest), folder / "counts.png")
    plot_sizes(manifest, folder / "sizes.png")
    plot_properties(manifest, folder / "properties.png")
    drawn = shown.duplicates[:GROUPS_DRAWN]
    plot_picture_rows(
        [(_duplicate_caption(group), [shown.pairs[member.path] for member in group.shown]) for group in drawn],
        folder / "duplicates.png",
        title=f"{len(drawn)} of {len(shown.duplicates):,} groups of images that show the same"
        if drawn
        else "No two images show the same",
    )
    _draw_montages(shown, Counter(manifest["label"]), folder)


def choose_montage(manifest: pd.DataFrame) -> dict[str, list[str]]:
    """Chooses the pictures of each class to show: the first ones of the manifest, one of each group.

    Many classes get fewer pictures each; of more than MONTAGE_PICTURES classes only so many are shown.

    Args:
        manifest: columns path, label, group.

    Returns:
        Paths by class, classes sorted.
    """
    classes = sorted(manifest["label"].unique())[:MONTAGE_PICTURES]
    each = min(MONTAGE_PICTURES_OF_CLASS, max(1, MONTAGE_PICTURES // max(1, len(classes))))
    first = manifest.drop_duplicates("group")
    return {name: first.loc[first["label"] == name, "path"].head(each).tolist() for name in classes}


def duplicate_groups(manifest: pd.DataFrame) -> list[Group]:
    """Finds the groups of several images, those whose members differ most first: they are worth a look.

    Args:
        manifest: columns path, label, split, width, height, bytes, sha256, perceptual_hash, group.
    """
    return _groups(manifest[manifest.duplicated("group", keep=False)])


def contradiction_groups(rejected: pd.DataFrame, read: ReadFile, *, max_pixels: float) -> list[Group]:
    """Finds which of the rejected files are the same picture under two labels.

    The table of rejected files does not say which belong together, so the files are read again, CONTRADICTIONS_READ
    of them at most.

    Args:
        rejected: columns path, label, reason, bytes.
        read: gives the bytes of a file.
        max_pixels: as the images were inspected with.
    """
    files = rejected[rejected["reason"].str.startswith(CONTRADICTION)]
    # By size, because that puts copies of one file side by side, so that a part of the table holds whole groups.
    files = files.sort_values(["bytes", "path"]).head(CONTRADICTIONS_READ)
    if files.empty:
        return []
    with _pool() as pool:
        facts = list(pool.map(lambda name: inspect(read(name), max_pixels=max_pixels), files["path"]))
    measured = {
        name: [getattr(one, name) for one in facts] for name in ("width", "height", "sha256", "perceptual_hash")
    }
    files = files.assign(split="", **measured)
    # Equal bytes have equal perceptual hashes, so these tell enough, but for blank pictures, which all have the hash 0.
    blank = files["perceptual_hash"].str.strip("0") == ""
    files["group"] = files["perceptual_hash"].mask(blank, files["sha256"])
    return _groups(files[files.groupby("group")["label"].transform("nunique") > 1])


def _groups(files: pd.DataFrame) -> list[Group]:
    found: dict[Any, list[Member]] = {}
    for row in files.sort_values("path").to_dict("records"):
        member = Member(**{field.name: row[field.name] for field in fields(Member)})
        found.setdefault(row["group"], []).append(member)
    groups = [Group(tuple(members)) for members in found.values()]
    return sorted(groups, key=lambda group: (-group.distance, group.is_one_file, group.members[0].path))


def split_class_counts(manifest: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Counts images by split and class: classes sorted, and `unused` only where it has images."""
    counts = Counter(zip(manifest["split"], manifest["label"], strict=True))
    splits = [*SPLITS, *({UNUSED} & set(manifest["split"]))]
    return {split: {name: counts[split, name] for name in sorted(set(manifest["label"]))} for split in splits}


def suffix_mismatches(manifest: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows whose name has the suffix of another image format than their content.

    Args:
        manifest: columns path, format.
    """
    wrong = [
        PurePosixPath(name).suffix.lower() not in SUFFIXES.get(kind, {PurePosixPath(name).suffix.lower()})
        for name, kind in zip(manifest["path"], manifest["format"], strict=True)
    ]
    return manifest[pd.Series(wrong, index=manifest.index, dtype=bool)].sort_values("path")


def histogram(values: pd.Series, *, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """Counts values in equal bars, for the page.

    Values outside the range count in the first or last bar, so that a few giants do not squeeze all others into one.

    Args:
        values: finite numbers, one or more.
        low: where the first bar begins; default: the 0.5 % quantile.
        high: where the last bar ends; default: the 99.5 % quantile.

    Returns:
        `low` and `high` of the axis, `median`, and `bars`: from, to, count and height (0..1 of the largest) of each.
    """
    numbers = values.to_numpy(np.float64)
    low = float(np.quantile(numbers, 0.005)) if low is None else low
    high = float(np.quantile(numbers, 0.995)) if high is None else high
    if high <= low:
        low, high = low - 0.5, low + 0.5
    edges = np.linspace(low, high, HISTOGRAM_BARS + 1)
    counts, _ = np.histogram(numbers.clip(low, high), edges)
    bars = [
        {"from": float(edges[i]), "to": float(edges[i + 1]), "count": int(n), "height": float(n / counts.max())}
        for i, n in enumerate(counts)
    ]
    return {"low": low, "high": high, "median": float(np.median(numbers)), "bars": bars}


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(4, processors()))


def _tiles(
    manifest: pd.DataFrame, rejected: pd.DataFrame, report: Mapping[str, Any], groups: Sequence[Group]
) -> list[dict[str, Any]]:
    """The headline numbers."""
    tiles: list[dict[str, Any]] = [
        {"value": len(manifest), "name": "images"},
        {"value": manifest["label"].nunique(), "name": "classes"},
        {"value": len(rejected), "name": "files rejected"},
        {
            "value": len(groups),
            "name": "duplicate groups",
            "note": f"{sum(len(group.members) for group in groups):,} images" if groups else "",
        },
        {"value": int(report["leaks"]), "name": "leaks between splits", "bad": report["leaks"] > 0},
    ]
    more = {
        "unused": int((manifest["split"] == UNUSED).sum()),
        "without a label": int(report.get("unlabelled", 0)),
        "end early": int(report.get("ends_early", 0)),
    }
    return tiles + [{"value": value, "name": name} for name, value in more.items() if value]


def _class_rows(manifest: pd.DataFrame, counts: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """One row a class: counts by split, bars, and what could give the class away without its content."""
    totals = Counter(manifest["label"])
    medians = manifest.groupby("label")[["width", "height", "brightness"]].median().to_dict("index")
    return [
        {
            "name": name,
            "counts": [row[name] for row in counts.values()],
            "bars": [row[name] / max(totals.values()) for row in counts.values()],
            "total": totals[name],
            "share": totals[name] / len(manifest),
            **{str(quantity): value for quantity, value in medians[name].items()},
        }
        for name in sorted(totals)
    ]


def _quantities(manifest: pd.DataFrame) -> dict[str, tuple[pd.Series, str]]:
    """What is measured of every image: values and how to print one."""
    return {
        "width, pixels": (manifest["width"], "{:,.0f}"),
        "height, pixels": (manifest["height"], "{:,.0f}"),
        "width / height": (manifest["width"] / manifest["height"], "{:.2f}"),
        "file size, kB": (manifest["bytes"] / 1000, "{:,.1f}"),
        "brightness": (manifest["brightness"], "{:.0f}"),
    }


def _histograms(manifest: pd.DataFrame) -> list[dict[str, Any]]:
    quantities = _quantities(manifest)
    longer = manifest[["width", "height"]].max(axis=1), "{:,.0f}"
    drawn = {"longer side, pixels": longer} | {
        name: quantities[name] for name in ("width / height", "file size, kB", "brightness")
    }
    result = []
    for name, (values, form) in drawn.items():
        whole_range = {"low": 0.0, "high": 255.0} if name == "brightness" else {}
        found = histogram(values, **whole_range)
        result.append(
            {
                "name": name,
                "bars": [
                    {
                        "position": position,
                        "height": bar["height"],
                        "count": bar["count"],
                        "text": f"{form.format(bar['from'])} to {form.format(bar['to'])}: {bar['count']:,} images",
                    }
                    for position, bar in enumerate(found["bars"])
                ],
                **{key: form.format(found[key]) for key in ("low", "high", "median")},
            }
        )
    return result


def _spread(manifest: pd.DataFrame) -> list[dict[str, Any]]:
    """Smallest, 5 %, median, 95 % and largest value of each quantity."""
    return [
        {"name": name, "values": [form.format(value) for value in values.quantile([0, 0.05, 0.5, 0.95, 1])]}
        for name, (values, form) in _quantities(manifest).items()
    ]


def _format_table(manifest: pd.DataFrame) -> dict[str, Any]:
    """Images by file format (down) and colour mode (across), the most frequent first."""
    both = Counter(zip(manifest["format"], manifest["mode"], strict=True))
    by_format, by_mode = Counter(manifest["format"]), Counter(manifest["mode"])
    wrong = Counter(suffix_mismatches(manifest)["format"])
    modes = _most_frequent(by_mode)
    rows = [
        {
            "name": name,
            "counts": [both[name, mode] for mode in modes],
            "total": by_format[name],
            "mismatches": wrong[name],
        }
        for name in _most_frequent(by_format)
    ]
    return {"modes": modes, "rows": rows}


def _most_frequent(counts: Counter[str]) -> list[str]:
    """The most frequent first; by name where two are as frequent."""
    return sorted(counts, key=lambda name: (-counts[name], name))


def _mismatch_facts(manifest: pd.DataFrame) -> dict[str, Any]:
    wrong = suffix_mismatches(manifest)
    examples = [f"{row.path} is {row.format}" for row in wrong.head(EXAMPLES_SHOWN).itertuples()]
    return {"count": len(wrong), "examples": examples}


def _reason_counts(rejected: pd.DataFrame) -> list[dict[str, Any]]:
    counts = Counter(rejected["reason"])
    order = _most_frequent(counts)
    rows = [{"reason": reason, "count": counts[reason]} for reason in order[:REASONS_SHOWN]]
    if rest := order[REASONS_SHOWN:]:
        rows.append({"reason": f"{len(rest):,} other reasons", "count": sum(counts[reason] for reason in rest)})
    return rows


def _duplicate_caption(group: Group) -> str:
    first = group.members[0]
    names = "\n".join(printable(_shortened(member.path)) for member in group.shown)
    return f"{first.split}, {_kind(group)}\n{names}"


def _shortened(path: str, length: int = 34) -> str:
    return path if len(path) <= length else f"…{path[1 - length :]}"


def _kind(group: Group) -> str:
    if group.is_one_file:
        return "the same file"
    if group.distance == 0:
        return "alike, no bit apart"
    return f"alike, {group.distance} bit{'s' if group.distance > 1 else ''} apart"


def _group_facts(group: Group, pixels: Mapping[str, Pixels]) -> dict[str, Any]:
    return {
        "kind": _kind(group),
        "exact": group.is_one_file,
        "more": len(group.members) - len(group.shown),
        "members": [
            {
                "path": member.path,
                "label": member.label,
                "split": member.split,
                "uri": _data_uri(pixels[member.path]),
                "width": pixels[member.path].shape[1],
                "height": pixels[member.path].shape[0],
                "size": f"{member.width:,} x {member.height:,}, {member.bytes / 1000:,.1f} kB",
            }
            for member in group.shown
        ],
    }


def _square(pixels: Pixels) -> Pixels:
    return resize(pixels, min(MONTAGE_SIDE, max(1, min(pixels.shape[:2]))), "crop")


def _data_uri(pixels: Pixels) -> str:
    return data_uri(encode_jpeg(pixels, _JPEG_QUALITY), "jpeg")


def _draw_montages(shown: Shown, totals: Mapping[str, int], folder: Path) -> None:
    """One picture a class where there are few, else one with a row a class."""
    for old in sorted(folder.glob("montage*.png")):
        old.unlink()
    montage = {name: [shown.squares[one] for one in names] for name, names in shown.montage.items()}
    if len(montage) > CLASSES_WITH_OWN_MONTAGE:
        plot_picture_rows(
            [(printable(_shortened(name)), pictures) for name, pictures in montage.items()],
            folder / "montage.png",
            title=f"Pictures of {len(montage):,} classes, drawn at random",
            side=MONTAGE_SIDE // 2,
        )
        return
    for number, (name, pictures) in enumerate(montage.items(), start=1):
        # A class name may hold what a file name must not; the number keeps those apart that then look the same.
        readable = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:40]
        plot_picture_rows(
            [("", pictures[start : start + 8]) for start in range(0, len(pictures), 8)],
            folder / f"montage-{number}-{readable}.png",
            title=f"{printable(_shortened(name, 60))}: {len(pictures)} of {totals[name]:,} pictures, drawn at random",
            side=MONTAGE_SIDE,
        )
