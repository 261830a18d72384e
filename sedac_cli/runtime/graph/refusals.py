"""What the graph engine refuses of a single call, whatever it was made for: settings it does not apply, texts no graph can follow.

refuse_call(loaded, prompt=12, options=options)        # or InputError
"""

from __future__ import annotations

from transformers import GenerationMixin

from sedac_cli.errors import InputError
from sedac_cli.models import LoadedModel
from sedac_cli.runtime.generate import GenerateOptions
from sedac_cli.runtime.graph.capture import EAGER
from sedac_cli.runtime.warp import unusual_setting


def refuse_call(loaded: LoadedModel, prompt: int, options: GenerateOptions) -> None:
    """Both, ahead of an engine."""
    refuse_settings(loaded, options)
    refuse_recomputing(loaded, prompt, prompt + options.max_new_tokens)


def refuse_settings(loaded: LoadedModel, options: GenerateOptions, own_sampling: bool = True) -> None:
    if setting := unusual_setting(loaded, sampled=options.temperature > 0 and own_sampling):
        raise InputError(f"{setting}, which the graph engine does not apply", hint=EAGER)


def refuse_recomputing(loaded: LoadedModel, prompt: int, total: int) -> None:
    """Some models (Phi-3 with `longrope`) begin their cache anew where a text grows out of the first length: all keys then turn by
    other frequencies. The last token of a text is never read."""
    model = loaded.model
    own = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    first = getattr(model.config.get_text_config(), "original_max_position_embeddings", None)
    kind = getattr(getattr(loaded.decoder.backbone, "rotary_emb", None), "rope_type", None)
    if own and kind == "longrope" and isinstance(first, int) and prompt <= first < total - 1:
        raise InputError(
            f"{type(model).__name__} computes its whole cache anew where a text exceeds {first + 1} tokens, which no graph does: this "
            f"one would go from {prompt} to {total}",
            hint=f"at most {first + 1} tokens in all, or {EAGER}",
        )
