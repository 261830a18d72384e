"""`sedac generate`: prompt in, text out, with a gate in force."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sedac_cli.artifacts.files import plain
from sedac_cli.commands._common import option, sedac_command
from sedac_cli.commands._online import Adaptive, CalibrationSteps, DeepRounds, DeepThreshold, read_online
from sedac_cli.config import ModelSpec
from sedac_cli.console import Output
from sedac_cli.errors import InputError, UsageError, did_you_mean
from sedac_cli.palette import legend, style_of

if TYPE_CHECKING:
    from sedac_cli.runtime.generate import Generated

DRAFTS = ["gate", "ngram", "suffix", "ngram_gate", "suffix_gate"]


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
    adaptive: Adaptive = None,
    calibration_steps: CalibrationSteps = None,
    deep_threshold: DeepThreshold = None,
    deep_rounds: DeepRounds = None,
    lossless: Annotated[
        bool,
        option(
            "Lossless",
            "--lossless",
            help="The gated model only drafts; the full model verifies: the text is dense's own.",
        ),
    ] = False,
    draft: Annotated[
        str | None,
        option("Lossless", "--draft",
               help="Where drafts come from: gate, ngram, suffix, ngram_gate or suffix_gate; default gate."),
    ] = None,
    draft_tokens: Annotated[
        int | None,
        option("Lossless", "--draft-tokens", min=1, max=64, help="Most tokens drafted before a verify pass; default 4."),
    ] = None,
    adapt: Annotated[
        bool | None,
        option("Lossless", "--adapt/--no-adapt", help="Draft fewer where few are accepted (default), or always that many."),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="graph (CUDA graphs), eager, or auto: graph where it can run.")
    ] = "auto",
    show: Annotated[str, typer.Option("--show", help="text, or exits: colour tokens by what they skipped.")] = "text",
) -> None:  # fmt: skip
    """Generate text with a gate in force; says tokens/s and how much was skipped."""
    if show not in ("text", "exits"):
        raise UsageError(f"--show: '{show}' is not known", hint="text or exits")
    if temperature == 0 and (top_p < 1 or top_k):
        raise UsageError(
            f"{'--top-p' if top_p < 1 else '--top-k'} is about drawing; at temperature 0 nothing is drawn",
            hint="--temperature 0.8",
        )
    drafts = read_drafts(lossless, draft, draft_tokens, adapt, gate)
    prompts = read_prompts(prompt or [], prompt_file)
    if not chat and not all(prompts):
        raise InputError("an empty prompt: there is nothing to continue")
    online = read_online(adaptive, calibration_steps, deep_threshold, deep_rounds)
    deep = online.deep
    if lossless and deep is not None:
        raise UsageError(
            "--deep-threshold and --lossless cannot be had together", hint="a verified text is dense's own"
        )
    from sedac_cli.models import load_model
    from sedac_cli.runtime.engines import Used, generate_with, require_engine
    from sedac_cli.runtime.generate import GenerateOptions
    from sedac_cli.runtime.plan import check_spec, make_plan

    check_spec(gate)
    require_engine(engine, model.device, lossless=lossless, deep=deep is not None)
    loaded = load_model(model)
    plan = make_plan(gate, loaded.decoder, loaded.identity, seed=seed)
    online.adapt(plan)
    options = GenerateOptions(max_new_tokens, temperature, top_p, top_k, seed, chat, ignore_eos)
    result: Generated
    used = Used("eager")
    if lossless:
        from sedac_cli.runtime.speculate import SpeculateOptions, speculate

        result = speculate(loaded, plan, prompts, options, SpeculateOptions(*drafts))  # type: ignore[arg-type]
    else:
        result, used = generate_with(engine, loaded, plan, prompts, options, deep)
    for note in used.notes:
        out.note(note)
    for index, text in enumerate(result.texts):
        if len(prompts) > 1:
            out.text(f"--- prompt {index + 1}")
        if show == "exits":
            colour(out, prompts[index], result, index)
        else:
            out.text(prompts[index] + text if not chat else text)
    if lossless:
        tell_drafts(out, result)
    out.note(
        f"{result.new_tokens} tokens, {result.tokens_per_second:.1f} tokens/s "
        f"(decode {result.decode_tokens_per_second:.1f}); MLP skip ratio {result.skip_ratio:.1%} "
        f"(decode {result.skip_ratio_decode:.1%}), gate {gate}, engine {used.name}"
    )
    if result.deep is not None:
        out.note(
            f"deep thinking above {result.deep.tau_high:g} bits: {result.deep.tokens} of {result.new_tokens} tokens run "
            f"again, {result.deep.passes} more forward passes (counted in the skip ratios)"
        )
    thresholds = getattr(plan.gate, "adaptive", None)
    found = None if thresholds is None else thresholds.report()
    for row in found or []:
        rate = "none judged yet" if row["rate"] is None else f"exit rate {row['rate']:.1%}"
        out.note(
            f"layer {row['layer']}: threshold {row['threshold']:.4f} after {row['tokens']} tokens, {rate}, "
            f"target {row['target']:.1%}"
        )
    out.result(plain(result) | {"adaptive": found, "engine": plain(used)})


def read_drafts(
    lossless: bool, draft: str | None, draft_tokens: int | None, adapt: bool | None, gate: str
) -> tuple[str, int, bool]:
    """Source, length and whether the length adapts. None: not given."""
    source = "gate" if draft is None else draft
    if source not in DRAFTS:
        raise UsageError(f"--draft: '{draft}' is not known.{did_you_mean(source, DRAFTS)}", hint=", ".join(DRAFTS))
    given = {"--draft": draft, "--draft-tokens": draft_tokens, "--no-adapt" if adapt is False else "--adapt": adapt}
    for name, value in given.items():
        if value is not None and not lossless:
            raise UsageError(f"{name} is about drafts, which only --lossless makes", hint=f"--lossless, or no {name}")
    if lossless and source.endswith("gate") and gate == "never":
        raise UsageError("--lossless drafts with a gate, and none is named", hint="--gate always:14, or --draft ngram")
    return source, 4 if draft_tokens is None else draft_tokens, adapt is not False


def tell_drafts(out: Output, result: Any) -> None:
    """What was accepted, beside what it takes to pay."""
    if not result.proposed:
        out.note("no drafts were made: every token is a dense step")
        return
    reached = result.acceptance_rate
    out.note(
        f"drafts: {result.accepted} of {result.proposed} accepted (AR {reached:.1%}), TRR {result.token_recovery_rate:.1%}, "
        f"{result.verify_tokens / result.verify_steps:.2f} tokens per verify pass, drafts skip {result.draft_skip_ratio:.1%}"
    )
    clock = result.break_even_measured
    if clock == 0:
        out.note(
            "  by this machine's clock: the run is too short, or the machine too busy, to compare with dense steps"
        )
    elif clock is not None:
        passes = result.verify_steps + clock * result.proposed  # what the run took, in dense steps
        speed = (result.verify_steps + result.accepted) / passes
        out.note(f"  by this machine's clock: {speed:.2f}x as fast as dense steps; {told(reached, clock)}")
    if result.break_even_flops is not None:
        out.note(f"  by FLOPs, where a verify pass costs one dense step: {told(reached, result.break_even_flops)}")


def told(reached: float, limit: float) -> str:
    if limit > 1:
        return f"no acceptance could make it pay (break-even AR {limit:.1%})"
    return f"{'pays' if reached > limit else 'does not pay'} (AR {reached:.1%}, break-even {limit:.1%})"


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
