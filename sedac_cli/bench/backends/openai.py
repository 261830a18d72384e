"""The `openai` backend: any OpenAI-compatible server, under load. What a server does inside is its own business, so a
configuration is a server (`base_url`) or something one request can ask for (`extra_body`)."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from typing import Any

from sedac_cli.bench.backends import Cell, Session
from sedac_cli.bench.matrix import Experiment, Matrix
from sedac_cli.bench.metrics import Run
from sedac_cli.bench.online import Endpoint, LoadClient
from sedac_cli.bench.quality import Scored, quality_from_logprobs
from sedac_cli.config import ModelSpec
from sedac_cli.corpus import Corpus
from sedac_cli.errors import InputError, UsageError

DEFAULT = ModelSpec().ref


def open_backend(matrix: Matrix, model: ModelSpec, seed: int) -> OpenAI:
    return OpenAI(matrix, seed)


class OpenAI:
    name = "openai"
    one_at_a_time = False
    tokenizer = None
    baseline = "the server of the configuration in mode dense, under the same load"

    def __init__(self, matrix: Matrix, seed: int):
        self.matrix, self.seed = matrix, seed
        self._dense: list[Scored] | None = None
        self._served: list[str] = []
        asked: dict[str, str] = {}
        for experiment in matrix.experiments:
            if experiment.how.loop:
                raise UsageError(
                    f"'{experiment.name}': drafts are the server's own matter, mode '{experiment.mode}' is not ours"
                )
            what = json.dumps([self._url(experiment), experiment.extra_body], sort_keys=True)
            if what in asked:
                raise UsageError(
                    f"'{asked[what]}' and '{experiment.name}' ask the same of the same server: a gate named here does not "
                    "reach it",
                    hint="a base_url or an extra_body of its own",
                )
            asked[what] = experiment.name

    def describe(self) -> dict[str, Any]:
        model = ", ".join(self._served) or self.matrix.base_model
        return {"model": model, "engine": "server", "device": None, "dtype": None}

    def cells(self) -> list[Cell]:
        matrix = self.matrix
        at_once = matrix.concurrency or ([] if matrix.request_rates else matrix.batch)
        return [Cell(count, None, matrix.new_tokens) for count in at_once] + [
            Cell(1, None, matrix.new_tokens, rate) for rate in matrix.request_rates
        ]

    def engines(self, experiment: Experiment) -> list[str]:
        return ["server"]

    def prompts_per_run(self, cell: Cell) -> int:
        return self.matrix.requests

    @contextlib.contextmanager
    def open(self, experiment: Experiment, cell: Cell, engine: str) -> Iterator[Session]:
        with self._client(experiment) as client:
            yield ServerSession(client, cell, self.seed)

    def aside(self, cell: Cell, engine: str, prompts: list[str]) -> None:
        return None

    def quality(self, experiment: Experiment, corpus: Corpus | None, prompts: list[str]) -> dict[str, Any] | None:
        """Perplexity of the prompts, from the server's own log-probabilities of them."""
        if self.matrix.quality.tasks:
            raise InputError(
                "lm-eval tasks are run by --backend hf", hint="lm_eval --model local-completions for a server"
            )
        with self._client(experiment) as client:
            own = [_scored(client, prompt) for prompt in prompts]
        if experiment.is_baseline:
            self._dense = own
        return quality_from_logprobs(self._dense, own, self.seed)

    def close(self) -> None:
        pass

    def _url(self, experiment: Experiment) -> str:
        url = experiment.base_url or self.matrix.base_url
        if url is None:
            raise UsageError(f"'{experiment.name}' names no server", hint="--url http://127.0.0.1:8000/v1, or base_url")
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"'{url}' is not a URL", hint="http://127.0.0.1:8000/v1")
        return url

    @contextlib.contextmanager
    def _client(self, experiment: Experiment) -> Iterator[LoadClient]:
        matrix, url = self.matrix, self._url(experiment)
        with LoadClient(Endpoint(url, "", timeout=matrix.request_timeout)) as asking:
            served = asking.get("models").get("data") or []
        name, room = _pick_model(served, matrix.base_model, url)
        if name not in self._served:
            self._served.append(name)
        longest = max(matrix.prompt_lengths) + matrix.new_tokens
        if room is not None and longest > room:
            raise InputError(
                f"{url}: prompts of {max(matrix.prompt_lengths)} tokens and {matrix.new_tokens} new ones exceed the "
                f"server's {room}",
                hint="shorter --prompt-lengths, or fewer --new-tokens",
            )
        with LoadClient(Endpoint(url, name, matrix.chat, experiment.extra_body, matrix.request_timeout)) as client:
            yield client


SETTLE = 1.2  # seconds; a gated vLLM publishes its counters once a second


class ServerSession:
    def __init__(self, client: LoadClient, cell: Cell, seed: int):
        self.client, self.cell, self.seed = client, cell, seed

    def run(self, prompts: list[str], new_tokens: int) -> Run:
        before = self.client.skips()  # settled: what ran before this run has waited for its own
        began = time.perf_counter()
        answers = self.client.load(prompts, new_tokens, at_once=self.cell.batch, rate=self.cell.rate, seed=self.seed)
        seconds = time.perf_counter() - began
        after = None if before is None else self._settled()
        decided = after[0] - before[0] if before and after else 0.0
        done = [answer for answer in answers if answer.request.error is None]
        return Run(
            seconds=seconds,
            prompt_tokens=sum(answer.request.prompt_tokens for answer in done),
            new_tokens=sum(answer.request.new_tokens for answer in done),
            prefill_seconds=None,
            decode_seconds=None,
            ttft=[answer.request.ttft for answer in done if answer.request.ttft is not None],
            itl=[gap for answer in done for gap in answer.gaps],
            sequences=len(done),
            skip_ratio=(after[1] - before[1]) / decided if before and after and decided > 0 else None,
            requests=[answer.request for answer in answers],
        )

    def _settled(self) -> tuple[float, float] | None:
        """The server's counters once they stand still: published late, a run's skips would be the next one's."""
        found = self.client.skips()
        for _ in range(5):
            time.sleep(SETTLE)
            found, before = self.client.skips(), found
            if found == before:
                break
        return found

    def close(self) -> None:
        pass


def _pick_model(served: Any, wanted: str, url: str) -> tuple[str, int | None]:
    """The name to ask for, and the context length where the server tells it."""
    known = {str(m["id"]): m for m in served if isinstance(m, dict) and "id" in m} if isinstance(served, list) else {}
    if not known:
        raise InputError(f"{url}/models lists no model")
    if wanted not in known and (wanted != DEFAULT or len(known) > 1):
        raise InputError(f"{url} serves {', '.join(known)}, not '{wanted}'", hint=f"--model {next(iter(known))}")
    name = wanted if wanted in known else next(iter(known))
    room = known[name].get("max_model_len")
    return name, room if isinstance(room, int) else None


def _scored(client: LoadClient, prompt: str) -> Scored:
    """Every token of the prompt but the first."""
    asked = {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    found = client.post(
        "completions", {"model": client.endpoint.model, "prompt": prompt, **asked, **client.endpoint.extra_body}
    )
    try:
        told = found["choices"][0]["logprobs"]
        row, count, tops = told["token_logprobs"], found["usage"]["prompt_tokens"], told.get("top_logprobs")
    except (KeyError, IndexError, TypeError, AttributeError):
        row, count, tops = None, None, None
    if not isinstance(row, list) or not isinstance(count, int) or len(row) < count or count < 2:
        raise InputError(
            f"{client.endpoint.base_url} gives no log-probabilities of a prompt (echo with logprobs): "
            "its quality cannot be measured from outside",
            hint="--quality-samples 0 leaves quality out",
        )
    values = row[1:count]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise InputError(f"{client.endpoint.base_url} gives log-probabilities that are not numbers")
    return Scored([float(value) for value in values], _best(tops, count))


def _best(tops: Any, count: int) -> list[str] | None:
    """The text of the most likely token at each place; servers that tell none have no agreement."""
    rows = tops[1:count] if isinstance(tops, list) else []
    if len(rows) != count - 1 or not all(isinstance(row, dict) and row for row in rows):
        return None
    if not all(isinstance(value, int | float) for row in rows for value in row.values()):
        return None
    return [max(row, key=lambda text: (row[text], text)) for row in rows]
