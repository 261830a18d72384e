"""`sedac chat`: talk with a model and see what every token skipped."""

from __future__ import annotations

from typing import Annotated

import typer

from sedac_cli.commands._common import option, sedac_command
from sedac_cli.config import ModelSpec
from sedac_cli.console import Output, on_interrupt


@sedac_command(model=ModelSpec())
def chat(
    out: Output,
    seed: int,
    model: ModelSpec,
    gate: Annotated[
        str, typer.Option("--gate", help="never, always:14, cascade:sedac_data/thresholds.json, learned:FILE.pth@0.25.")
    ] = "never",
    system: Annotated[str | None, typer.Option("--system", help="What the model is told before the conversation.")] = None,
    template: Annotated[
        bool | None,
        typer.Option("--template/--no-template", help="Use the chat template, or continue plain text; default: if there is one."),
    ] = None,
    max_new_tokens: Annotated[int, option("Sampling", "--max-new-tokens", min=1, help="Tokens per reply.")] = 256,
    temperature: Annotated[float, option("Sampling", "--temperature", min=0, max=10, help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, option("Sampling", "--top-p", min=0.01, max=1, help="Nucleus share.")] = 0.95,
    top_k: Annotated[int, option("Sampling", "--top-k", min=0, help="0 keeps all tokens.")] = 0,
) -> None:  # fmt: skip
    """Talk with a model; every token is coloured by the MLPs really skipped for it. /help lists the commands."""
    from sedac_cli.chat.loop import talk
    from sedac_cli.chat.screen import make_screen
    from sedac_cli.chat.session import Params, Session
    from sedac_cli.models import load_model
    from sedac_cli.runtime.plan import check_spec

    check_spec(gate)
    params = Params(max_new_tokens, temperature, top_p, top_k, seed)
    session = Session(load_model(model), gate, params, system, template)
    way = "its chat template" if session.template else "plain continuation"
    out.note(f"{model.ref}, gate {gate}, {way}; /help lists the commands")
    on_interrupt(None)
    talk(session, make_screen(out))
    out.result({"stats": session.stats(), "turns": [turn.as_document() for turn in session.turns]})
