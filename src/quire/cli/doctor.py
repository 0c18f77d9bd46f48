"""``quire doctor``: what was found on this machine."""

import json
import platform
from typing import Any

import click

import quire

__all__ = ["doctor"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Say what was found on this machine.

    Processor features, usable threads, memory, extras, and backends with why one is off.
    """
    found = _findings()
    if as_json:
        click.echo(json.dumps(found))
        return
    _print(found)


def _findings() -> dict[str, Any]:
    from quire.backends import backend_status
    from quire.extras import extras
    from quire.machine import this_machine
    from quire.models import resolve_model

    machine = this_machine()
    return {
        "quire": quire.__version__,
        "python": platform.python_version(),
        "system": machine.system,
        "cpu": machine.cpu_name,
        "cpu_features": list(machine.cpu_features),
        "threads": machine.threads,
        "logical_cpus": machine.logical_cpus,
        "affinity_cpus": machine.affinity_cpus,
        "quota_cpus": machine.quota_cpus,
        "memory_bytes": machine.memory_bytes,
        "available_bytes": machine.available_bytes,
        "backends": [
            {"name": s.name, "available": s.available, "detail": s.detail} for s in backend_status()
        ],
        "extras": {
            extra: {part.name: part.installed for part in parts}
            for extra, parts in extras().items()
        },
        "quill": str(resolve_model(None)),
    }


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from quire.config import format_bytes
    from quire.extras import extras, why_off

    def size(count: int | None) -> str:
        return "unknown" if count is None else format_bytes(count)

    quota = "none" if found["quota_cpus"] is None else f"{found['quota_cpus']:g} CPUs"
    facts = Table("", show_header=False, box=None, pad_edge=False)
    facts.add_row("Quire", f"{found['quire']}, Python {found['python']}, {found['system']}")
    facts.add_row("processor", f"{found['cpu']}: {' '.join(found['cpu_features']) or 'unknown'}")
    facts.add_row(
        "threads",
        f"{found['threads']} usable ({found['logical_cpus']} CPUs, {found['affinity_cpus']} by "
        f"affinity, control group quota {quota})",
    )
    facts.add_row(
        "memory", f"{size(found['memory_bytes'])}, {size(found['available_bytes'])} available"
    )
    for backend in found["backends"]:
        state = "on" if backend["available"] else "off"
        facts.add_row("backend", f"{backend['name']} {state}: {backend['detail']}")
    for extra, parts in extras().items():
        reason = why_off(extra, parts)
        there = ", ".join(f"{part.name} {part.installed}" for part in parts)
        facts.add_row("extra", f"{extra} " + (f"off: {reason}" if reason else f"on: {there}"))
    facts.add_row("model", f"quill at {found['quill']}")
    Console(highlight=False, markup=False).print(facts)
