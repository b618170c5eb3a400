"""Completes the pipeline's parent run in MLflow, also for the stages that DVC did not have to run.

It has no outputs, so DVC never restores it from its cache: whenever anything changed, it runs.
"""

from catdog.tracking import stage, track


def main() -> None:
    """Runs the stage."""
    with stage("track") as run:
        track(run)


if __name__ == "__main__":
    main()
