"""Curves for whoever wants to watch, by Accelerate's own trackers: TensorBoard, W&B, MLflow, Trackio.

runs/digits-bbn-1/
    tensorboard/      TensorBoard's files: tensorboard --logdir runs
    tracking.json     which run of W&B, MLflow or Trackio this one is; a resumed run continues its curves

Runs on the same dataset are one project; credentials and servers are the trackers' own settings, such as WANDB_PROJECT
and MLFLOW_TRACKING_URI.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from shards.atomic import write_json
from shards.errors import UserError
from train.engine.config import Tracker

FILE = "tracking.json"


class Tracking:
    """Hands a run's numbers to a tracker; does nothing where tracking is off.

    Raises:
        UserError: the tracker's package is not installed.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._name = tracker
        self._tracker: GeneralTracker | None = None
        if tracker != "none":
            try:
                import_module("torch.utils.tensorboard" if tracker == "tensorboard" else tracker)
            except ImportError as error:
                raise UserError(
                    f"loop.track={tracker} needs the package {tracker} ({error}): pip install {tracker}, or use"
                    " --loop.track none"
                ) from None

    def open(self, run_folder: Path, step: int, project: str, sections: dict[str, dict[str, Any]]) -> None:
        """Begin, or continue what a resumed run wrote before.

        Args:
            run_folder: the run's folder.
            step: where the run is; what was written of later steps is replaced where the tracker can do that.
            project: under which the tracker puts the run.
            sections: the run's configuration, which a new run gives to the tracker, too.

        Raises:
            UserError: the tracker does not start; its own message is in it.
        """
        if self._name == "none":
            return
        known = _read_id(run_folder, self._name)
        token, name = known or uuid4().hex[:8], run_folder.name
        try:
            if self._name == "tensorboard":
                tracker: GeneralTracker = TensorBoardTracker("tensorboard", run_folder, purge_step=step + 1)
            elif self._name == "wandb":
                project = os.environ.get("WANDB_PROJECT", project)
                tracker = WandBTracker(project, id=token, name=name, dir=str(run_folder), resume="allow")
            elif self._name == "trackio":
                tracker = TrackioTracker(project, name=f"{name}-{token}", resume="allow")
            else:
                tracker = MLflowTracker(project, run_id=known, run_name=name)
            tracker.start()
            if self._name != "tensorboard" and known is None:  # TensorBoard would show its settings as another run
                values = {
                    f"{section}.{key}": value for section, part in sections.items() for key, value in part.items()
                }
                tracker.store_init_configuration(
                    {
                        key: value if isinstance(value, bool | int | float | str) else str(value)
                        for key, value in values.items()
                    }
                )
        except Exception as error:
            raise UserError(
                f"loop.track={self._name} does not start ({_one_line(error)}); follow its message, or use"
                " --loop.track none"
            ) from error
        if self._name == "mlflow":
            token = tracker.tracker.info.run_id
        if self._name != "tensorboard":
            write_json(run_folder / FILE, {"tracker": self._name, "id": token})
        self._tracker = tracker

    def row(self, row: dict[str, Any]) -> None:
        """Hand on an epoch's row of metrics.jsonl: its numbers as train/NAME, those of its evaluation as SPLIT/NAME.

        A tracker that fails, such as one whose server is out of reach, costs its curve and not the run.
        """
        if self._tracker is None:
            return
        numbers = {f"train/{name}": value for name, value in row.items()}
        if "eval" in row:
            numbers |= {f"{row['eval']['split']}/{name}": value for name, value in row["eval"].items()}
        numbers = {name: value for name, value in numbers.items() if isinstance(value, int | float)}
        self._call("log", numbers, step=row["step"])

    def close(self) -> None:
        """End."""
        if self._tracker is not None:
            self._call("finish")
            self._tracker = None

    def _call(self, action: str, *arguments: Any, **options: Any) -> None:
        try:
            getattr(self._tracker, action)(*arguments, **options)
        except Exception as error:
            print(
                f"warning: {self._name} failed ({_one_line(error)}); training continues, and metrics.jsonl has its"
                " numbers",
                file=sys.stderr,
                flush=True,
            )


def _read_id(run_folder: Path, tracker: str) -> str | None:
    """Return the tracker's own name of a run that it has seen before."""
    try:
        saved = json.loads((run_folder / FILE).read_text(encoding="utf-8"))
        return str(saved["id"]) if saved["tracker"] == tracker else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
