"""lm-eval tasks in a benchmark: scores task by task, dense beside each configuration, dense run once for all of them.

Always true: tasks that the harness does not know are refused before anything is measured.

    tasks = Tasks(Quality(tasks=["arc_easy"]), seed=0)
    tasks.scores(loaded, plan)["arc_easy"]["metrics"]["acc,none"]["drop"]
"""

from __future__ import annotations

import contextlib
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from sedac_cli.bench.matrix import Quality
from sedac_cli.errors import InputError
from sedac_cli.models import LoadedModel
from sedac_cli.runtime.plan import Plan


class Tasks:
    def __init__(self, wanted: Quality, seed: int):
        try:
            self._run: Any = import_module("sedac_cli.harness.run")
            self._model: Any = import_module("sedac_cli.harness.model")
        except ImportError as error:
            raise InputError(
                f"tasks {', '.join(wanted.tasks)}: not available here ({error})", hint="pip install 'sedac[eval]'"
            ) from None
        folder = None if wanted.task_folder is None else Path(wanted.task_folder)
        self.wanted = wanted
        self.options = self._run.EvalOptions(include_path=folder, limit=wanted.task_limit, seed=seed)
        self._manager = self._run.find_tasks(wanted.tasks, folder)
        self._dense: dict[str, Any] = {}

    def scores(self, loaded: LoadedModel, plan: Plan) -> dict[str, Any]:
        """Per task: documents, skip ratio on them, every metric dense and own, and every document's values."""
        with contextlib.redirect_stdout(sys.stderr):  # the harness prints; stdout is for the result
            lm = self._model.SedacLM(loaded.model, plan, tokenizer=loaded.tokenizer, batch_size=self.wanted.batch_size)
            report = self._run.evaluate_tasks(lm, self.wanted.tasks, self.options, self._manager, self._dense)
        return {
            task.task: {
                "documents": task.samples,
                "skip_ratio": task.skip_ratio,
                "metrics": {
                    name: {
                        "dense": m.dense, "dense_stderr": m.dense_stderr, "own": m.gated, "own_stderr": m.gated_stderr,
                        "drop": m.drop, "worse": m.lost, "better": m.won, "higher_is_better": m.higher_is_better,
                    }
                    for name, m in task.metrics.items()
                },
                "samples": task.samples_raw,
            }
            for task in report.tasks
        }  # fmt: skip
