"""`methods`: the ways to choose layers."""

from trsp_core.cli import output
from trsp_core.cli.command import command
from trsp_core.pruning import methods


@command("methods")
def main(as_json: bool) -> None:
    fields = ("name", "title", "summary", "paper", "differences")
    rows = [{field: getattr(method, field) for field in fields} for method in methods.all_methods().values()]
    output.show_either(rows, output.sentences(rows), as_json)
