"""The command ``millrace``: its options. What they do is in ``server.cli``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.names import (
    DeviceName,
    DtypeName,
    KvCacheDtypeName,
    LogLevel,
    MethodName,
    QuantizationName,
)

__all__ = ["app", "main"]

app = typer.Typer(
    name="millrace",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _option(name: str, description: str, **more: Any) -> Any:
    """Return an option that can also be set as ``MILLRACE_…`` in the environment."""
    variable = "MILLRACE_" + name.removeprefix("--").replace("-", "_").upper()
    return typer.Option(name, help=description, envvar=variable, **more)


def _show_version(wanted: bool) -> None:
    if wanted:
        from server.cli.version import version

        typer.echo(f"millrace {version()}")
        raise typer.Exit


@app.callback()
def _millrace(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Millrace: an asynchronous streaming chat server with an engine of its own."""


@app.command()
def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint directory, or name on the Hugging Face hub.", envvar="MILLRACE_MODEL"
        ),
    ] = "pebble",
    host: Annotated[str, _option("--host", "Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, _option("--port", "Port to listen on; 0 takes a free one.", min=0, max=65535)
    ] = 8000,
    dtype: Annotated[DtypeName, _option("--dtype", "Type of the weights.")] = DtypeName.AUTO,
    quantization: Annotated[
        QuantizationName, _option("--quantization", "Make the weights smaller at loading.")
    ] = QuantizationName.NONE,
    device: Annotated[DeviceName, _option("--device", "Where it runs.")] = DeviceName.AUTO,
    kv_cache_dtype: Annotated[
        KvCacheDtypeName,
        _option("--kv-cache-dtype", "fp8 (a GPU) fits twice the tokens into the KV cache."),
    ] = KvCacheDtypeName.AUTO,
    batch_invariant: Annotated[
        bool,
        _option("--batch-invariant", "The same bits in any batch, also on a GPU, at a price."),
    ] = False,
    max_model_len: Annotated[
        int | None, _option("--max-model-len", "Most tokens of prompt and answer together.")
    ] = None,
    kv_memory: Annotated[
        str | None, _option("--kv-memory", "Size of the KV cache, such as 512MiB or 4GiB.")
    ] = None,
    max_num_tokens: Annotated[
        int | None, _option("--max-num-tokens", "Most tokens computed in one step.")
    ] = None,
    max_num_seqs: Annotated[
        int | None, _option("--max-num-seqs", "Most requests that run at once.")
    ] = None,
    steps_ahead: Annotated[
        int | None,
        _option("--steps-ahead", "Steps launched before the last one's tokens are known, 0 or 1."),
    ] = None,
    cuda_graphs: Annotated[
        bool,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            help="On a GPU, record steps without prompts and replay them.",
            envvar="MILLRACE_CUDA_GRAPHS",
        ),
    ] = True,
    num_threads: Annotated[
        int | None, _option("--num-threads", "Compute threads on a CPU.")
    ] = None,
    redis_url: Annotated[
        str | None,
        _option(
            "--redis-url",
            "Where to keep state: redis://host:6379, or redis+sentinel://host:port,host:port/NAME.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, _option("--api-key-file", "File of API keys: one a line, or [[key]] tables.")
    ] = None,
    max_queue: Annotated[
        int, _option("--max-queue", "Turns that may wait for their first token.", min=1)
    ] = 512,
    max_queue_wait: Annotated[
        float, _option("--max-queue-wait", "Longest expected wait of a turn, seconds.")
    ] = 60.0,
    drain_seconds: Annotated[
        float, _option("--drain-seconds", "How long answers may go on after SIGTERM.", min=0)
    ] = 30.0,
    max_connections: Annotated[
        int, _option("--max-connections", "Open connections, all together.", min=1)
    ] = 8192,
    max_connections_per_address: Annotated[
        int, _option("--max-connections-per-address", "Open connections of one address.", min=1)
    ] = 8192,
    price_prompt: Annotated[
        float, _option("--price-prompt", "Price of a million prompt tokens.", min=0)
    ] = 0.0,
    price_cached: Annotated[
        float, _option("--price-cached", "The same for those from the prefix cache.", min=0)
    ] = 0.0,
    price_completion: Annotated[
        float, _option("--price-completion", "Price of a million generated tokens.", min=0)
    ] = 0.0,
    served_model_name: Annotated[
        str | None, _option("--served-model-name", "The model's name in the API.")
    ] = None,
    adapter: Annotated[
        Path | None, _option("--adapter", "LoRA adapter to merge into the model at loading.")
    ] = None,
    log_level: Annotated[
        LogLevel, _option("--log-level", "How much to log.", case_sensitive=False)
    ] = LogLevel.INFO,
) -> None:
    """Serve a model: the API, and the chat page, on one port. Without MODEL the bundled one."""
    logging.basicConfig(
        level=log_level.value.upper(), format="%(asctime)s %(name)s %(levelname)s %(message)s"
    )
    from engine import Device, Dtype, EngineConfig, KvCacheDtype, Quantization, parse_bytes
    from server.cli.serve import StartError
    from server.cli.serve import serve as run
    from server.metering.ledger import Prices
    from server.settings import ServerSettings

    try:
        config = EngineConfig(
            model=model,
            served_name=served_model_name,
            dtype=Dtype(dtype.value),
            quantization=Quantization(quantization.value),
            device=Device(device.value),
            kv_cache_dtype=KvCacheDtype(kv_cache_dtype.value),
            batch_invariant=batch_invariant,
            max_model_len=max_model_len,
            kv_memory_bytes=None if kv_memory is None else parse_bytes(kv_memory),
            max_num_tokens=max_num_tokens,
            max_num_seqs=max_num_seqs,
            steps_ahead=steps_ahead,
            cuda_graphs=cuda_graphs,
            num_threads=num_threads,
            adapter=None if adapter is None else str(adapter.expanduser().absolute()),
        )
        settings = ServerSettings(
            host=host,
            port=port,
            redis_url=redis_url,
            api_key_file=api_key_file,
            max_queue=max_queue,
            max_queue_wait_s=max_queue_wait,
            drain_s=drain_seconds,
            max_connections=max_connections,
            max_connections_per_address=max_connections_per_address,
            prices=Prices(prompt=price_prompt, cached=price_cached, completion=price_completion),
        )
        status = run(settings, config)
    except (StartError, ValueError) as error:
        _fail(str(error))
    raise typer.Exit(status)


@app.command()
def chat(
    url: Annotated[str, _option("--url", "The server.")] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(help="Model to talk to.", show_default="the server's")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 always takes the likeliest token.", min=0, max=2)
    ] = None,
    api_key: Annotated[str | None, _option("--api-key", "API key of the server.")] = None,
) -> None:
    """Talk to a server in the terminal; piped input gets one plain answer."""
    from server.cli.chat import chat as run

    status = run(url, model=model, system=system, temperature=temperature, api_key=api_key)
    raise typer.Exit(status)


@app.command()
def tune(
    model: Annotated[
        str, typer.Argument(help="Checkpoint directory, name on the Hugging Face hub, or pebble.")
    ],
    data: Annotated[
        Path,
        typer.Argument(
            help="JSON Lines (also .gz, .xz) of messages, of prompt and completion, or of text."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Directory to write.", show_default="beside the data")
    ] = None,
    method: Annotated[
        MethodName, typer.Option(help="All weights, or LoRA; auto goes by data and model.")
    ] = MethodName.AUTO,
    merge: Annotated[
        bool, typer.Option("--merge/--keep-adapter", help="Write a whole model, or the adapter.")
    ] = True,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data.", show_default="by its size")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its peak.", show_default="by the model's width")
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a step.", show_default="by the data")
    ] = None,
    max_len: Annotated[
        int | None, typer.Option(help="Cut examples to this many tokens.", show_default="2048")
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    alpha: Annotated[
        float | None, typer.Option(help="Scale of the adapter.", show_default="twice the rank")
    ] = None,
    rslora: Annotated[bool, typer.Option(help="Scale by the rank's root (rsLoRA).")] = False,
    target_modules: Annotated[
        str | None,
        typer.Option(help="Matrices to adapt, such as q_proj,v_proj.", show_default="all"),
    ] = None,
    patience: Annotated[
        int, typer.Option(help="Measurements without improvement that end the run.")
    ] = 3,
    skip_bad: Annotated[bool, typer.Option(help="Leave out lines that cannot be used.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier result.")] = False,
    seed: Annotated[int, typer.Option(help="Decides order and held-out examples.")] = 0,
    device: Annotated[DeviceName, typer.Option(help="Where it runs.")] = DeviceName.AUTO,
    num_threads: Annotated[
        int | None, typer.Option(help="Compute threads on a CPU.", show_default="one for each core")
    ] = None,
) -> None:
    """Fine-tune a model on examples of what it should answer."""
    from engine.train.tuning.plan import LINEAR_MODULES, Method, TuneSettings
    from server.cli.tune import TuneError, default_out
    from server.cli.tune import tune as run

    names = tuple(part.strip() for part in (target_modules or "").split(",") if part.strip())
    try:
        settings = TuneSettings(
            data=data,
            out=out or default_out(data, model),
            model=model,
            method=Method(method.value),
            keep_adapter=not merge,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_tokens=batch_tokens,
            max_len=max_len,
            rank=rank,
            alpha=alpha,
            rslora=rslora,
            target_modules=names or LINEAR_MODULES,
            patience=patience,
            skip_bad=skip_bad,
            overwrite=overwrite,
            seed=seed,
            device=device.value,
            num_threads=num_threads,
        )
        status = run(settings)
    except (TuneError, ValueError) as error:
        _fail(str(error))
    raise typer.Exit(status)


@app.command()
def quantize(
    model: Annotated[
        str, typer.Argument(help="Checkpoint directory, name on the Hugging Face hub, or pebble.")
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    scheme: Annotated[
        QuantizationName, typer.Option(help="What the weight matrices become.")
    ] = QuantizationName.FP8,
    keep: Annotated[
        str, typer.Option(help="Modules left as they are, such as lm_head,model.layers.0.*")
    ] = "lm_head",
    budget: Annotated[
        str | None,
        typer.Option(help="Most that the perplexity may rise, such as 1%; keeps what costs most."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="JSON Lines to measure perplexity on, as for tune.",
            show_default="20 fixed prompts",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of it that are used.")] = 16384,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure perplexity before and after.")
    ] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier result.")] = False,
    num_threads: Annotated[
        int | None, typer.Option(help="Compute threads.", show_default="one for each core")
    ] = None,
) -> None:
    """Make a model's weights smaller, and say what that costs."""
    from engine import Quantization
    from engine.train.quantising.plan import QuantiseSettings
    from server.cli.quantize import QuantizeError, parse_share
    from server.cli.quantize import quantize as run

    try:
        settings = QuantiseSettings(
            out=out,
            model=model,
            scheme=Quantization(scheme.value),
            keep=tuple(part.strip() for part in keep.split(",") if part.strip()),
            budget=None if budget is None else parse_share(budget),
            data=data,
            max_tokens=max_tokens,
            measure=measure,
            overwrite=overwrite,
            num_threads=num_threads,
        )
        status = run(settings)
    except (QuantizeError, ValueError) as error:
        _fail(str(error))
    raise typer.Exit(status)


@app.command(
    add_help_option=False,
    context_settings={
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "help_option_names": [],
    },
)
def train(context: typer.Context) -> None:
    """Make a model from data: every option of ``python -m engine.train`` (--help lists them)."""
    from server.cli.train import train as run

    raise typer.Exit(run(context.args))


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="For you, to know it by.")] = "",
) -> None:
    """Make an API key and print it, once, with what the key file needs."""
    from server.guard.keys import hash_of, make_key

    new = make_key()
    typer.echo(f"The key, which is shown now and never again:\n\n    {new}\n")
    typer.echo("For the key file (--api-key-file); limits may follow, see the README:\n")
    typer.echo(f'    [[key]]\n    name = "{_plain(name)}"\n    hash = "{hash_of(new)}"')


def _plain(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable() and letter not in '"\\')


def _fail(message: str) -> None:
    """End with one line on what is wrong."""
    typer.echo(f"millrace: error: {' '.join(message.split())}", err=True)
    raise typer.Exit(2)


def main() -> None:
    """Run the command."""
    app()


if __name__ == "__main__":
    main()
