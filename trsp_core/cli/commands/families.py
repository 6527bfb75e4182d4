"""`families`: what became of each architecture of transformers, and the families with something particular to them."""

from trsp_core import formatting
from trsp_core.cli import output
from trsp_core.cli.command import command
from trsp_core.models import architectures
from trsp_core.surgery import families


@command("families")
def main(as_json: bool) -> None:
    fields = ("name", "model_types", "refused", "note")
    rows = [{field: getattr(family, field) for field in fields} for family in families.all_families().values()]
    survey = architectures.recorded()
    outcomes = [vars(outcome) for outcome in survey.outcomes]
    values = {"families": rows, "sweep": {"transformers": survey.transformers, "outcomes": outcomes}}
    cells = [["supported", ", ".join(outcome.model_type for outcome in survey.of("supported"))]]
    for kind in ("refused", "no decoder", "not built", "failed"):
        cells += [[kind, f"{', '.join(types)}: {reason}."] for reason, types in survey.groups(kind).items()]
    output.show_either(values, f"{formatting.table(cells)}\n\n{output.sentences(rows)}", as_json)
