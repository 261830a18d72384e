"""`sedac generate`: prompt in, text out, with a gate in force."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sedac_cli.commands._common import option, sedac_command
from sedac_cli.config import ModelSpec
from sedac_cli.console import Output
from sedac_cli.errors import InputError, UsageError
from sedac_cli.palette import legend, style_of

if TYPE_CHECKING:
    from sedac_cli.runtime.generate import Generated


@sedac_command(model=ModelSpec())
def generate(
    out: Output,
    seed: int,
    model: ModelSpec,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", "-p", allow_from_autoenv=False, help="Text to continue; repeat it for a batch. - reads stdin."
        ),
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="One prompt per line.")] = None,
    gate: Annotated[
        str, typer.Option("--gate", help="never, always:14, random:0.3, cascade:sedac_data/thresholds.json.")
    ] = "never",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate.")] = 128,
    temperature: Annotated[float, option("Sampling", "--temperature", min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, option("Sampling", "--top-p", min=0.01, max=1, help="Nucleus share.")] = 1.0,
    top_k: Annotated[int, option("Sampling", "--top-k", min=0, help="0 keeps all tokens.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")] = False,
    show: Annotated[str, typer.Option("--show", help="text, or exits: colour tokens by what they skipped.")] = "text",
) -> None:
    """Generate text with a gate in force; says tokens/s and how much was skipped."""
    if show not in ("text", "exits"):
        raise UsageError(f"--show: '{show}' is not known", hint="text or exits")
    prompts = read_prompts(prompt or [], prompt_file)
    from sedac_cli.models import load_model
    from sedac_cli.runtime.generate import GenerateOptions
    from sedac_cli.runtime.generate import generate as run
    from sedac_cli.runtime.plan import make_plan

    loaded = load_model(model)
    plan = make_plan(gate, loaded.decoder, loaded.identity, seed=seed)
    options = GenerateOptions(max_new_tokens, temperature, top_p, top_k, seed, chat, ignore_eos)
    result = run(loaded, plan.gate, prompts, options, plan.standin)
    for index, text in enumerate(result.texts):
        if len(prompts) > 1:
            out.text(f"--- prompt {index + 1}")
        if show == "exits":
            colour(out, prompts[index], result, index)
        else:
            out.text(prompts[index] + text if not chat else text)
    out.note(
        f"{result.new_tokens} tokens, {result.tokens_per_second:.1f} tokens/s "
        f"(decode {result.decode_tokens_per_second:.1f}); MLP skip ratio {result.skip_ratio:.1%} "
        f"(decode {result.skip_ratio_decode:.1%}), gate {gate}"
    )
    out.result(result)


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    where: object = "stdin"
    try:
        prompts = [sys.stdin.buffer.read().decode("utf-8") if p == "-" else p for p in given]
        if file is not None:
            where = file
            prompts += [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read prompts from {where}: {error}") from None
    if not prompts:
        raise UsageError("no prompt", hint='--prompt "The sea was", --prompt - for stdin, or --prompt-file FILE')
    return prompts


def colour(out: Output, prompt: str, result: Generated, index: int) -> None:
    """Each token on a scale from cool (all MLPs ran) to warm (most were skipped); numbers where there is no colour."""
    if out.json:
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    line = Text(prompt, style="dim")
    for token in result.tokens[index]:
        label = token.text if console.is_terminal else f"{token.text}[{token.skipped}]"
        line.append(label, style=style_of(token.skipped, result.num_layers))
    console.print(line, soft_wrap=True)
    scale = Text("MLPs skipped: ", style="dim")
    for name, style in legend():
        scale.append(f" {name} ", style=style)
    console.print(scale)
