"""Validates every image, finds duplicates, and divides the rest into train, val and test."""

import os
import zipfile

import pandas as pd

from catdog import paths
from catdog.errors import CatdogError
from catdog.files import write_text
from catdog.images import decode
from catdog.labels import label_files
from catdog.plots import plot_class_counts, plot_gallery, plot_sizes
from catdog.quality import REJECTED_COLUMNS, group_duplicates, inspect_archive, require_mostly_accepted
from catdog.split import assign_splits, count_table, draw_order, find_leaks, reject_contradictions
from catdog.tracking import log_data_hash, stage

MONTAGE_IMAGES = 40


def main() -> None:
    """Runs the stage."""
    with stage("split") as run, zipfile.ZipFile(paths.RAW) as archive:
        log_data_hash(run, paths.RAW)
        params = run.params.split
        labelling = label_files(archive.namelist())
        images, rejected = inspect_archive(
            archive, labelling, max_pixels=params.max_megapixels * 1e6, workers=os.cpu_count() or 1
        )
        contradictions = reject_contradictions(images)
        images = images.drop(contradictions.index).reset_index(drop=True)
        rejected = pd.concat([rejected, contradictions[REJECTED_COLUMNS]], ignore_index=True)
        write_text(paths.REJECTED, rejected.to_csv(index=False))
        require_mostly_accepted(len(images), rejected, params.max_rejected)

        group = group_duplicates(
            images["sha256"].tolist(), images["perceptual_hash"].tolist(), params.near_duplicate_bits
        )
        images["group"] = group
        images["split"] = assign_splits(images, val=params.val, test=params.test, seed=run.params.seed)
        images = images.loc[draw_order(images, run.params.seed).sort_values().index]
        if not (leaks := find_leaks(images)).empty:
            raise CatdogError(f"the audit found a leak between splits: {', '.join(leaks['path'].head(4))}; report this")
        write_text(paths.MANIFEST, images.to_csv(index=False))

        shown = images.head(MONTAGE_IMAGES)
        plot_gallery(
            [decode(archive.read(path)) for path in shown["path"]],
            list(shown["label"]),
            paths.DATA_PICTURES / "montage.png",
            title=f"{len(shown)} of {len(images):,} pictures, drawn at random",
        )
        counts = count_table(images)
        plot_class_counts(counts, paths.DATA_PICTURES / "counts.png")
        plot_sizes(images, paths.DATA_PICTURES / "sizes.png")
        run.finish(
            {
                "classes": list(labelling.classes),
                "images": len(images),
                "rejected": len(rejected),
                "rejected_by_reason": rejected["reason"].value_counts().sort_index().to_dict(),
                "in_duplicate_groups": int((images["group"].value_counts() - 1).clip(lower=0).sum()),
                "ends_early": int((images["note"] != "").sum()),
                "leaks": len(leaks),
                "counts": counts,
            },
            f"{len(images):,} images in {len(labelling.classes)} classes ("
            + ", ".join(f"{split} {sum(row.values()):,}" for split, row in counts.items())
            + f"), {len(rejected):,} files rejected"
            + (f", see {paths.REJECTED}" if len(rejected) else ""),
        )


if __name__ == "__main__":
    main()
