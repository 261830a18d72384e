"""From logits to what is chosen from: the model's own generation settings, as transformers applies them.

Settings this cannot apply position by position are refused: drafts would be judged by another rule than dense text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sedac_cli.errors import InputError
from sedac_cli.models import LoadedModel
from sedac_cli.runtime.generate import GenerateOptions

# What a generation config may hold that changes logits, with the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "no_repeat_ngram_size": (None, 0), "bad_words_ids": (None,), "min_length": (None, 0), "min_new_tokens": (None, 0),
    "forced_bos_token_id": (None,), "forced_eos_token_id": (None,), "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,), "sequence_bias": (None,), "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1, 1.0), "num_beams": (None, 1), "remove_invalid_values": (None, False),
    "encoder_repetition_penalty": (None, 1.0), "encoder_no_repeat_ngram_size": (None, 0), "watermarking_config": (None,),
}  # fmt: skip
NEUTRAL_SAMPLING: dict[str, tuple[Any, ...]] = {
    "min_p": (None, 0, 0.0), "typical_p": (None, 1.0), "epsilon_cutoff": (None, 0, 0.0), "eta_cutoff": (None, 0, 0.0),
    "top_h": (None,),
}  # fmt: skip


def unusual_setting(loaded: LoadedModel, sampled: bool) -> str | None:
    """What the model's generation config holds that changes logits in another way than temperature, cuts and repetitions. `sampled`:
    by what counts where tokens are drawn, too."""
    config = loaded.model.generation_config
    for name, values in (NEUTRAL | NEUTRAL_SAMPLING if sampled else NEUTRAL).items():
        if getattr(config, name, None) not in values:
            return f"the generation settings of {loaded.identity.ref} hold {name} = {getattr(config, name)}"
    return None


def repetition_penalty(loaded: LoadedModel) -> float:
    """The model's own; 1 where it has none."""
    found = getattr(loaded.model.generation_config, "repetition_penalty", None)
    return 1.0 if found is None else float(found)


class Warp:
    """Scores of [N, V] logits; `greedy` takes their argmax, sampling their softmax."""

    def __init__(self, loaded: LoadedModel, options: GenerateOptions):
        from transformers.generation.logits_process import (
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self.greedy = options.temperature == 0
        if setting := unusual_setting(loaded, sampled=not self.greedy):
            raise InputError(f"{setting}, which drafts cannot be judged under", hint="generate without --lossless")
        penalty = repetition_penalty(loaded)
        self.penalty: Any = RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1.0 else None
        self.warpers: list[Any] = []
        if not self.greedy:
            if options.temperature != 1.0:
                self.warpers.append(TemperatureLogitsWarper(options.temperature))
            if options.top_k:
                self.warpers.append(TopKLogitsWarper(options.top_k))
            if options.top_p < 1.0:
                self.warpers.append(TopPLogitsWarper(options.top_p))

    def __call__(self, logits: Tensor, texts: list[list[int]]) -> Tensor:
        """`texts[i]`: the tokens before row i, the prompt's included."""
        scores = logits.float()
        if self.penalty is not None:
            rows = [
                self.penalty(torch.tensor([text], device=scores.device), scores[i : i + 1])
                for i, text in enumerate(texts)
            ]
            scores = torch.cat(rows)
        for warper in self.warpers:
            scores = warper(None, scores)
        return scores
