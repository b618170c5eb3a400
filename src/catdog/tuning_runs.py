"""A hyperparameter search in MLflow: a parent run, and in it a run a trial."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient


NUMBER_TAG = "tune.trial"


class SearchRuns:
    """The runs of a search in the tracking store, which is opened when it is first needed."""

    def __init__(self, root: Path, *, required: bool) -> None:
        """Takes the root of the main repository, and whether to stop where its store cannot be used."""
        self._root, self._required = root, required
        self._tried = False
        self._opened: MlflowClient | None = None

    @property
    def _client(self) -> MlflowClient | None:
        # Late: MLflow takes seconds to import, and a finished search needs none of it.
        from catdog.tracking import StoreError, connect, pipeline_experiment

        if not self._tried:
            self._tried = True
            try:
                client = connect(self._root)
                pipeline_experiment(client)
                self._opened = client
            except StoreError as error:
                if self._required:
                    raise
                print(f"catdog tune: {error}; working without MLflow", file=sys.stderr)
        return self._opened

    def open_parent(self, known: str, done: int, params: Mapping[str, str]) -> str:
        """Takes up the parent run of a search that was cut off, or makes one.

        Args:
            known: its id; empty where there is none yet.
            done: number of trials that the search keeps.
            params: what the search is like.

        Returns:
            The id of the parent run, which is RUNNING; `known` where there is no store.
        """
        client = self._client
        if client is None:
            return known
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):  # deleted for good, or in another store
            if known and client.get_run(known).info.lifecycle_stage == "active":
                self.close(known, done)
                client.update_run(known, status="RUNNING")
                return known
        run_id = str(client.create_run(_experiment(client), tags=_tags(), run_name="tune").info.run_id)
        client.log_batch(run_id, params=[Param(name, value) for name, value in params.items()])
        return run_id

    def close(self, parent: str, done: int) -> None:
        """Marks what a killed process left as KILLED: the parent, and the trials that the search does not know.

        Args:
            parent: its id; one that is not in this store is left alone.
            done: number of trials that the search keeps.
        """
        client = self._client
        if client is None:
            return
        from mlflow.exceptions import MlflowException

        from catdog.tracking import PARENT_TAG

        try:
            status = client.get_run(parent).info.status
        except MlflowException:
            return
        # The search does not know one that ended just before it was killed, and tries it once more.
        for stale in ("attributes.status = 'RUNNING'", f"tags.`{NUMBER_TAG}` = '{done + 1}'"):
            for run in client.search_runs([_experiment(client)], f"tags.`{PARENT_TAG}` = '{parent}' and {stale}"):
                if run.info.status != "KILLED":
                    client.set_terminated(run.info.run_id, "KILLED")
        if status == "RUNNING":
            client.set_terminated(parent, "KILLED")

    def end_parent(self, parent: str, status: str, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Ends the parent run, with numbers and texts about the search."""
        client = self._client
        if client is None:
            return
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        client.log_batch(
            parent,
            metrics=[Metric(name, value, now, 0) for name, value in metrics.items()],
            tags=[RunTag(name, value) for name, value in tags.items()],
        )
        client.set_terminated(parent, status)

    @contextlib.contextmanager
    def trial(self, parent: str, number: int, params: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """Records one trial; the block fills in its row."""
        row: dict[str, Any] = {}
        client = self._client
        if client is None:
            yield row
            return
        from mlflow.entities import Metric, Param, RunTag

        from catdog.tracking import PARENT_TAG

        tags = {PARENT_TAG: parent, NUMBER_TAG: str(number), **_tags()}
        run_id = client.create_run(_experiment(client), tags=tags, run_name=f"trial {number}").info.run_id
        client.log_batch(run_id, params=[Param(name, value) for name, value in params.items()])
        status = "KILLED"
        try:
            yield row
            status = "FINISHED" if row["status"] == "finished" else "FAILED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            now = int(time.time() * 1000)
            measured = [name for name in ("val_loss", "val_accuracy", "best_epoch", "seconds") if name in row]
            client.log_batch(
                run_id,
                metrics=[Metric(name, float(row[name]), now, 0) for name in measured],
                tags=[RunTag("error", row["error"])] if row.get("error") else [],
            )
            client.set_terminated(run_id, status)


def _experiment(client: MlflowClient) -> str:
    from catdog.tracking import pipeline_experiment

    return str(pipeline_experiment(client).experiment_id)


def _tags() -> dict[str, str]:
    return {
        "mlflow.source.name": "catdog tune",
        "mlflow.user": os.environ.get("USER") or os.environ.get("LOGNAME") or "unknown",
    }
