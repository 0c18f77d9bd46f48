"""``quire generate``: one prompt, one completion, streamed."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quire.cli.options import engine_options, make_engine, sampling_options, sampling_params
from quire.cli.progress import prefill_progress
from quire.cli.reading import read_prompt

if TYPE_CHECKING:
    from quire.engine import Completion, Engine, Request, StepOutput

__all__ = ["generate", "report", "run_request"]


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "-f",
    "--file",
    "path",
    type=click.Path(path_type=Path),
    help="Read the prompt from a file; - is standard input.",
)
@click.option("--token-ids", metavar="IDS", help="The prompt as token ids, such as 1,15043,29892.")
@sampling_options
@engine_options
@click.option(
    "--explain-cache",
    is_flag=True,
    help="Say on standard error what of the prompt was cached, and why the rest was not.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
def generate(prompt: str | None, path: Path | None, token_ids: str | None, **options: Any) -> None:
    """Continue PROMPT, printing the text as it comes.

    Without PROMPT it is read from --file, or from standard input. A checkpoint without a tokenizer
    takes --token-ids and prints token ids.
    """
    given = read_prompt(prompt, path, token_ids)
    as_json, explain = options.pop("as_json"), options.pop("explain_cache")
    params = sampling_params(options)
    engine = make_engine(options)
    explanation = engine.explain_prefix(given) if explain else None
    if explanation is not None and not as_json:
        click.echo(explanation, err=True)
    request = engine.submit(given, params)
    interrupted = run_request(engine, request, None if as_json else _show(engine))
    completion = request.completions[0]
    if as_json:
        told = _as_dict(completion)
        if explanation is not None:
            told["cache_reasons"] = explanation.reasons
        click.echo(json.dumps(told, ensure_ascii=False))
    elif sys.stdout.isatty():
        click.echo()
    if sys.stderr.isatty():
        click.echo(report(completion), err=True)
    if completion.error is not None:
        raise click.ClickException(completion.error)
    if interrupted:
        raise click.Abort


def run_request(engine: "Engine", request: "Request", show: Any) -> bool:
    """Step until the request is done, calling ``show`` with every output of it.

    Ctrl-C cancels the request and returns True; what was shown stays.
    """
    from contextlib import ExitStack

    prompt = len(request.prompt_tokens)
    try:
        with ExitStack() as stack:
            reading = stack.enter_context(prefill_progress(prompt, engine.config.max_batch_tokens))
            while not request.finished:
                outputs = [o for o in engine.step() if o.request is request]
                reading(request.samples[0].computed)
                if outputs:
                    stack.close()  # the bar goes before the first piece comes
                for output in outputs if show is not None else ():
                    show(output)
    except KeyboardInterrupt:
        engine.cancel(request)
        return True
    return False


def report(completion: "Completion") -> str:
    """One line about a completion, for a person."""
    from quire.config import format_bytes

    parts = [f"{completion.prompt_tokens} + {completion.new_tokens} tokens"]
    if completion.cached_tokens:
        parts.append(f"{completion.cached_tokens} from the cache")
    if completion.ttft_s is not None:
        parts.append(f"first after {completion.ttft_s:.2f} s")
    if completion.decode_tokens_per_s is not None:
        parts.append(f"then {completion.decode_tokens_per_s:.1f} tokens/s")
    parts.append(f"KV peak {format_bytes(completion.kv_bytes_peak)}")
    if completion.evicted_tokens:
        parts.append(f"{completion.evicted_tokens} tokens dropped")
    if completion.reading is not None:
        parts.append(str(completion.reading))
    if completion.streamed is not None:
        parts.append(completion.streamed)
    reason = completion.finish_reason
    at = "" if completion.stop_reason is None else f" at {completion.stop_reason!r}"
    return f"[{', '.join(parts)}; {reason}{at}; seed {completion.seed}]"


def _show(engine: "Engine") -> Any:
    def show(output: "StepOutput") -> None:
        # Without a tokenizer the ids themselves are the text.
        ids = "" if output.token_id is None else f"{output.token_id} "
        text = output.text if engine.codec is not None else ids
        sys.stdout.write(text)
        sys.stdout.flush()

    return show


def _as_dict(completion: "Completion") -> dict[str, Any]:
    names = (
        *("text", "token_ids", "finish_reason", "stop_reason", "prompt_tokens", "cached_tokens"),
        "cached_tokens_by_tier",
        *("new_tokens", "ttft_s", "decode_tokens_per_s", "kv_bytes_peak", "seed", "preemptions"),
        *("error", "score", "tier_decision", "streamed", "evicted_tokens"),
    )
    reading = None if completion.reading is None else asdict(completion.reading)
    return {name: getattr(completion, name) for name in names} | {"reading": reading}
