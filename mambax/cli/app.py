"""The commands and their options. Each imports what it needs when it runs."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mambax import __version__
from mambax.cli.errors import INTERRUPTED, Group

app = typer.Typer(
    name="mambax",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Mamba state-space models on PyTorch, MLX and NumPy.",
)

Model = Annotated[str, typer.Argument(help="A folder, or a repository 'owner/name' of the Hugging Face hub.")]
Backend = Annotated[
    str | None, typer.Option("--backend", "-b", help="torch, mlx, numpy; by default the best here.")
]
Device = Annotated[str | None, typer.Option(help="A device of the backend, such as cuda or cpu.")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16, bfloat16; by default as stored.")]
Scan = Annotated[str, typer.Option(help="The implementation of the scan; see 'mambax doctor'.")]
Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit of the repository.")]
Offline = Annotated[bool, typer.Option("--offline", help="Use what was downloaded before, and no network.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="At most this many tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help="0 takes the most likely token.")]
TopK = Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens of this probability together.")]
MinP = Annotated[float, typer.Option(help="Keep tokens of this fraction of the likeliest one's probability.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1, repeats become less likely.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text, on every backend.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the output; may be given several times.")]
Chunk = Annotated[int, typer.Option("--prefill-chunk", min=1, help="Prompt tokens read at once.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no speed on stderr.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mambax {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Mamba state-space models on PyTorch, MLX and NumPy."""


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; stdin when it is left out or '-'.")
    ] = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    prefill_chunk: Chunk = 512,
    backend: Backend = None,
    device: Device = None,
    dtype: Dtype = None,
    scan: Scan = "auto",
    revision: Revision = None,
    offline: Offline = False,
    quiet: Quiet = False,
) -> None:
    """Continue a text. Only the continuation goes to stdout."""
    from mambax.cli.generate import generate

    sampling = _sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    sampling |= {"seed": seed, "stop": stop or (), "max_new_tokens": max_tokens, "prefill_chunk": prefill_chunk}
    generate(model, prompt, sampling, _loading(backend, device, dtype, scan, revision, offline), quiet)


@app.command()
def chat(
    model: Model,
    template: Annotated[
        str | None,
        typer.Option(help="zephyr, chatml, plain, or a file with a Jinja template; by default the model's own."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="Instructions in front of the conversation.")] = None,
    load: Annotated[Path | None, typer.Option(help="Go on with a conversation saved by /save.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    prefill_chunk: Chunk = 512,
    backend: Backend = None,
    device: Device = None,
    dtype: Dtype = None,
    scan: Scan = "auto",
    revision: Revision = None,
    offline: Offline = False,
    quiet: Quiet = False,
) -> None:
    """Talk with a model. It keeps its state between turns: nothing is read twice."""
    from mambax.cli.chat import chat

    sampling = _sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    sampling |= {"seed": seed, "stop": stop or (), "max_new_tokens": max_tokens, "prefill_chunk": prefill_chunk}
    loading = _loading(backend, device, dtype, scan, revision, offline)
    chat(model, template, system, load, sampling, loading, quiet)


@app.command()
def info(model: Model, revision: Revision = None, offline: Offline = False) -> None:
    """Show what a checkpoint is, from its configuration and the headers of its files."""
    from mambax.cli.info import info

    info(model, revision, offline)


@app.command()
def doctor() -> None:
    """Show what works on this machine: each backend is run and compared with the reference."""
    from mambax.cli.doctor import doctor

    if not doctor():
        raise typer.Exit(1)


@app.command()
def bench(
    model: Annotated[
        str | None,
        typer.Argument(help="A folder or a repository; by default random weights of the shape of mamba-130m."),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", "-b", help="May be given several times; by default all that are installed."),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens to read.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write after them.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="How often to measure; medians are shown.")] = 3,
    device: Device = None,
    dtype: Dtype = None,
    scan: Scan = "auto",
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Measure how fast a model reads and writes here."""
    from mambax.cli.bench import bench

    options = _loading(None, device, dtype, scan, revision, offline)
    del options["backend"]
    bench(model, backend or [], prompt, tokens, rounds, options)


@app.command()
def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe in TOML or JSON; flags and --set come on top of it.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="Text, .jsonl or a folder of them; several times for more.")
    ] = None,
    run: Annotated[str | None, typer.Option("--run", help="The folder of the run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and run nothing.")] = False,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a step.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a row.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest learning rate.")] = None,
    d_model: Annotated[int | None, typer.Option(help="Width of a new model.")] = None,
    n_layer: Annotated[int | None, typer.Option(help="Blocks of a new model.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="Train this model further.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="bpe, bytes, characters, or a folder.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Tokens of a new bpe vocabulary.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and of the order of the text.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="Any key, as training.clip_norm=0.5; several times.")
    ] = None,
    backend: Backend = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Train a language model on text, or train one further."""
    from mambax.cli.train import train

    flags = {
        "data.train": text or None, "run": run, "training.steps": steps, "training.batch_size": batch_size,
        "data.length": length, "training.learning_rate": learning_rate, "model.d_model": d_model,
        "model.n_layer": n_layer, "model.pretrained": pretrained, "data.tokenizer": tokenizer,
        "data.vocab_size": vocab_size, "training.seed": seed, "backend": backend, "device": device,
    }  # fmt: skip
    if not train(recipe, flags, assignments or (), resume=resume, dry_run=dry_run, quiet=quiet):
        raise typer.Exit(INTERRUPTED)


@app.command()
def convert(
    source: Model,
    dest: Annotated[Path, typer.Argument(help="The folder to write.")],
    dtype: Dtype = None,
    revision: Revision = None,
    offline: Offline = False,
    quiet: Quiet = False,
) -> None:
    """Rewrite a checkpoint of any layout as a Hugging Face one."""
    import mambax
    from mambax.cli.terminal import bar, note, size

    with bar("Reading", in_bytes=True, quiet=quiet) as progress:
        mambax.convert(source, dest, dtype=dtype, revision=revision, local_files_only=offline, progress=progress)
    if not quiet:
        written = [path for path in dest.iterdir() if path.is_file()]
        note(f"{dest}: {len(written)} files, {size(sum(path.stat().st_size for path in written))}")


def _sampling(temperature: float, top_k: int, top_p: float, min_p: float, penalty: float) -> dict[str, Any]:
    """The sampling options, checked before a model is loaded."""
    from dataclasses import asdict

    from mambax.sampling import SamplingParams

    return asdict(SamplingParams(penalty, temperature, top_k, top_p, min_p))


def _loading(
    backend: str | None, device: str | None, dtype: str | None, scan: str, revision: str | None, offline: bool
) -> dict[str, Any]:
    return {
        "backend": backend, "device": device, "dtype": dtype, "scan": scan, "revision": revision,
        "local_files_only": offline,
    }  # fmt: skip


def main() -> None:
    """The entry point of the ``mambax`` command."""
    # a character that a terminal cannot show, or a byte that is not UTF-8, must not end the program
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "replace"), (sys.stdin, "surrogateescape")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors=errors)
    app()
