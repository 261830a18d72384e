"""The harness's scores with a gate in force: dense they are its own, gated they do not depend on how it batches."""

from __future__ import annotations

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from sedac_cli.errors import InputError, UsageError  # noqa: E402
from sedac_cli.gates.base import Guards  # noqa: E402
from sedac_cli.gates.simple import AlwaysGate  # noqa: E402
from sedac_cli.harness.model import SedacLM  # noqa: E402
from sedac_cli.runtime.plan import Plan  # noqa: E402
from sedac_cli.runtime.skip import skipping  # noqa: E402
from sedac_cli.standins import ZeroStandIn  # noqa: E402

TASKS = ["toy_choice", "toy_generate", "toy_rolling"]
OPTIONS = {"device": "cpu", "dtype": "float32"}


def scores(lm, folder, task):
    """What the model answered to every request of every document."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = lm_eval.simple_evaluate(model=lm, tasks=[task], task_manager=manager, bootstrap_iters=0)
    return [sample["resps"] for sample in sorted(results["samples"][task], key=lambda s: s["doc_id"])]


def flat(value):
    return [x for item in value for x in flat(item)] if isinstance(value, (list, tuple)) else [value]


@pytest.mark.parametrize("task", TASKS)
def test_dense_is_the_harness_s_own_model_bit_for_bit(tiny_folder, toy_tasks, task):
    expected = scores(HFLM(pretrained=str(tiny_folder), batch_size=5, **OPTIONS), toy_tasks, task)
    never = SedacLM(pretrained=str(tiny_folder), batch_size=5, **OPTIONS)
    switched_off = SedacLM(pretrained=str(tiny_folder), gate="always:1", batch_size=5, **OPTIONS)
    switched_off.gated = False
    assert scores(never, toy_tasks, task) == scores(switched_off, toy_tasks, task) == expected
    assert (never.skip_ratio, switched_off.tokens) == (0.0, 0)
    switched_off.gated = True
    assert scores(switched_off, toy_tasks, task) != expected
    assert switched_off.skip_ratio == 0.75


@pytest.mark.parametrize("task", TASKS)
def test_the_batch_size_changes_no_score(tiny_folder, toy_tasks, collected, task):
    found = {}
    for size in (1, 4, 32):
        lm = SedacLM(str(tiny_folder), f"cascade:{collected / 'thresholds.json'}", batch_size=size, **OPTIONS)
        found[size] = (flat(scores(lm, toy_tasks, task)), lm.skip_ratio, lm.tokens)
    for size in (4, 32):
        if task == "toy_generate":
            assert found[size][0] == found[1][0]
            continue  # a batch goes on until its last sequence ends, so more is counted
        assert found[size][0] == pytest.approx(found[1][0], rel=1e-4, abs=1e-4)
        assert found[size][1:] == found[1][1:]
    assert 0.05 < found[1][1] < 0.6


def test_scores_are_those_of_each_text_run_alone(tiny_folder, tiny):
    """Right padding is no token: sinks count from each sequence's own start, and padding is not in the skip ratio."""
    plan = Plan(AlwaysGate(4, 1, Guards(sinks=4)), ZeroStandIn())
    lm = SedacLM(str(tiny_folder), plan, batch_size=8, **OPTIONS)
    encode = tiny.tokenizer.encode
    requests = [(("", ""), encode(a), encode(b)) for a, b in [("the sea was", " old"), ("a", " king"), ("in the", "n")]]
    # Two that end in what the harness pads with.
    requests += [(("", ""), [40, 41, 0, 0], [9]), (("", ""), [50, 51], [0, 0, 0, 9])]
    answers = lm._loglikelihood_tokens(requests)
    ran = skipped = 0
    for (_, context, more), (score, _) in zip(requests, answers, strict=True):
        ids = torch.tensor([context + more])
        with skipping(tiny.model, plan.gate) as run:
            logits = tiny.model(ids[:, :-1]).logits.log_softmax(-1)
        own = logits[0, -len(more) :].gather(1, torch.tensor(more).unsqueeze(1)).sum().item()
        assert score == pytest.approx(own, abs=1e-4)
        ran += run.tokens
        skipped += sum(run.skipped_per_layer)
    assert (lm.tokens, lm.skip_ratio) == (ran, skipped / ran / 4)


def test_padding_that_cannot_be_told_from_a_token_costs_no_token_its_skips(tiny_folder):
    lm = SedacLM(str(tiny_folder), "always:1", batch_size=8, **OPTIONS)
    short, long = [40, 41, 0, 0], [40, 41, 0, 0, 0]
    lm._loglikelihood_tokens([(("", ""), short, [9]), (("", ""), long, [9])])
    assert lm.tokens == 10
    lm.reset()
    lm._loglikelihood_tokens([(("", ""), short, [9]), (("", ""), [7, *long], [9])])
    assert lm.tokens == 10


def test_a_gate_that_leaves_prompts_alone_skips_in_scored_text_but_not_in_prompts(tiny_folder, toy_tasks):
    plan = Plan(AlwaysGate(4, 1, Guards(prefill=False)), ZeroStandIn())
    lm = SedacLM(str(tiny_folder), plan, batch_size=4, **OPTIONS)
    scores(lm, toy_tasks, "toy_rolling")
    assert lm.skip_ratio == 0.75
    lm.reset()
    scores(lm, toy_tasks, "toy_generate")
    assert 0 < lm.skip_ratio < 0.5


def test_commas_of_a_spec_are_written_as_semicolons(tiny_folder):
    arguments = f"pretrained={tiny_folder},gate=stability:tau=0.5;k=2;min_layer=1,dtype=float32"
    lm = SedacLM.create_from_arg_string(arguments, {"device": "cpu", "batch_size": 2})
    assert (lm.plan.gate.name, lm.plan.gate.parameters()["k"]) == ("stability", 2)


def test_what_does_not_fit_is_refused(tiny_folder, collected):
    with pytest.raises(UsageError, match="decoder-only"):
        SedacLM(str(tiny_folder), backend="seq2seq")
    with pytest.raises(InputError, match="another model"):
        SedacLM("builtin:tiny", f"cascade:{collected / 'thresholds.json'}", **OPTIONS)
