"""`models`: those that are there; those of the hub that fit some words; or one of the hub, looked at."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import click

from trsp_core import escaping, formatting, machine, paths
from trsp_core.cli import output
from trsp_core.cli.command import command
from trsp_core.models import catalog, download
from trsp_core.models.catalog import HubModel, SearchResult
from trsp_core.preparation import forecast
from trsp_core.pruning import validate
from trsp_core.runs import limits
from trsp_core.runs.store import Store


@command("models")
@click.argument("words", nargs=-1, metavar="[WORD]...", help="to search for, or a hub id (owner/name)")
def main(words: tuple[str, ...], as_json: bool) -> None:
    if len(words) == 1 and catalog.is_hub_id(words[0]):
        model = download.look(words[0], limits.current())
        values, text = asdict(model), _description(model)
    elif words:
        models = download.search(" ".join(words), limits.current())
        values, text = [asdict(model) for model in models], formatting.table(_search_cells(models))
    else:
        values = _local_models()
        text = formatting.table(_local_cells(values))
    output.show_either(values, text, as_json)


def _description(model: HubModel) -> str:
    """A model of the hub in lines."""
    facts = model.facts
    memory, free = forecast.peak_bytes(validate.from_values({}, "quick"), facts), machine.available_memory()
    lines = [
        f"{model.id}: {facts.architecture}, {facts.n_layers} layers, {formatting.parameters(facts.parameters)} "
        "parameters",
        f"licence {model.licence or 'not given'}{', gated' if model.gated else ''}; "
        f"{formatting.count(model.downloads or 0)} downloads",
        f"download {formatting.size(model.bytes)}, safetensors",
        f"a Quick run needs about {formatting.size(memory)} of memory, {formatting.size(free)} are free",
        f"Fetch it: python -m trsp_core fetch {model.id}",
    ]
    return "\n".join(map(escaping.line, lines))


def _search_cells(models: Iterable[SearchResult]) -> list[list[str]]:
    cells = [["model", "parameters", "downloads", "licence"]]
    for model in models:
        licence = f"{model.licence or 'not given'}{', gated' if model.gated else ''}"
        cells.append(
            [model.id, formatting.parameters(model.parameters), formatting.count(model.downloads or 0), licence]
        )
    return cells


def _local_models() -> list[dict[str, Any]]:
    """The models that could be loaded now, and the rest of the catalogue."""
    absent = {"here": False, "n_layers": None, "parameters": None, "bytes": 0}
    rows = {
        name: {"name": name, "licence": source.licence, "download_bytes": source.size_bytes, **absent}
        for name, source in catalog.CATALOGUE.items()
    }
    for facts in catalog.here(filter(paths.folder, Store().models())):
        present = {"here": True, "n_layers": facts.n_layers, "parameters": facts.parameters, "bytes": facts.bytes}
        rows[facts.name] = rows.get(facts.name, {"name": facts.name, "licence": None, "download_bytes": 0}) | present
    return list(rows.values())


def _local_cells(rows: Iterable[dict[str, Any]]) -> list[list[str]]:
    cells = [["model", "here", "layers", "parameters", "licence"]]
    for row in rows:
        absent = f"no, {formatting.size(row['download_bytes'])} to fetch"
        here = formatting.size(row["bytes"]) if row["here"] else absent
        parameters = formatting.parameters(row["parameters"])
        cells.append([row["name"], here, str(row["n_layers"] or ""), parameters, row["licence"] or ""])
    return cells
