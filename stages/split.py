"""Validates every image, finds duplicates, and divides the rest into train, val and test."""

import functools
import sys

import pandas as pd

from catdog import paths
from catdog.archives import open_archive, read_member
from catdog.curation import divide, examine
from catdog.data_page import write_data_page
from catdog.files import write_text
from catdog.parallel import processors
from catdog.quality import require_mostly_accepted
from catdog.split import count_table
from catdog.tracking import log_data_hash, stage


def main() -> None:
    """Runs the stage."""
    with stage("split") as run, open_archive(paths.RAW) as archive:
        log_data_hash(run, paths.RAW)
        params = run.params.split
        found = examine(archive, params, root=run.root, workers=processors())
        write_text(paths.REJECTED, found.rejected.to_csv(index=False))
        require_mostly_accepted(len(found.images), found.rejected, params.max_rejected)

        for warning in found.warnings:
            print(f"split: {warning}", file=sys.stderr)
        divided = divide(found.images, params, seed=run.params.seed)
        manifest = divided.manifest
        rejected = pd.concat([found.rejected, divided.rejected], ignore_index=True)
        write_text(paths.REJECTED, rejected.to_csv(index=False))
        require_mostly_accepted(len(manifest), rejected, params.max_rejected)
        write_text(paths.UNLABELLED, found.unlabelled.to_csv(index=False))
        write_text(paths.MANIFEST, manifest.to_csv(index=False))
        counts = count_table(manifest)
        report = {
            "classes": list(found.classes),
            "method": divided.method,
            "images": len(manifest),
            "rejected": len(rejected),
            "rejected_by_reason": rejected["reason"].value_counts().sort_index().to_dict(),
            "unlabelled": len(found.unlabelled),
            "in_duplicate_groups": int((manifest["group"].value_counts() - 1).clip(lower=0).sum()),
            "groups_with_two_labels": int((manifest.groupby("group")["label"].nunique() > 1).sum()),
            "ends_early": int((manifest["note"] != "").sum()),
            "leaks": 0,  # `divide` raises otherwise
            "counts": counts,
        }
        write_data_page(
            paths.DATA_PAGE,
            manifest=manifest,
            rejected=rejected,
            report=report,
            read=functools.partial(read_member, archive),
            pictures=paths.DATA_PICTURES,
            max_pixels=params.max_megapixels * 1e6,
        )
        run.finish(
            report,
            f"{len(manifest):,} images in {len(found.classes)} classes ("
            + ", ".join(f"{split} {sum(row.values()):,}" for split, row in counts.items())
            + f"; {divided.method}), {len(rejected):,} files rejected"
            + (f", see {paths.REJECTED}" if len(rejected) else ""),
        )


if __name__ == "__main__":
    main()
