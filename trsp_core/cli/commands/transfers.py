"""`transfers`: the ways to move the chosen layers' work into the kept ones."""

from trsp_core.cli import output
from trsp_core.cli.command import command
from trsp_core.pruning import transfers


@command("transfers")
def main(as_json: bool) -> None:
    fields = ("name", "title", "summary", "paper")
    rows = [{field: getattr(transfer, field) for field in fields} for transfer in transfers.all_transfers().values()]
    output.show_either(rows, output.sentences(rows), as_json)
