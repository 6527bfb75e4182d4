"""The laws of the design, held against the code itself."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

from tests import ROOT
from trsp_core.schema import config

PAGE_RANKS = (("style",), ("app_state",), ("charts",), ("run",), ("what_if", "compare", "evidence", "paper"), ("tour",))
PAGES_WITHOUT_STREAMLIT = ("charts", "style.words", "evidence.faq", "evidence.published", "evidence.sentences",
                           "evidence.split_sentences", "tour.lessons", "what_if.history", "what_if.rivals")  # fmt: skip
CORE = sorted((ROOT / "trsp_core").rglob("*.py"))
PAGES = sorted((ROOT / "pages").rglob("*.py"))
HEAVY = ("torch", "transformers", "bitsandbytes", "datasets", "gensim", "peft", "distributed")
# A package imports only what stands before it, and nothing of its own rank. "" is the folder itself.
RANKS = (("",), ("schema",), ("surgery", "charts"), ("models",), ("data", "perf"), ("evaluation",), ("training",),
         ("pruning",), ("preparation",), ("runs",), ("experiments", "workbench", "export"), ("cli",))  # fmt: skip
TORCH_FREE = ("", "schema", "charts", "models", "data", "preparation", "runs", "experiments", "export", "cli")
TORCH_FREE_BESIDE = ("surgery.families", "evaluation.intervals", "evaluation.questions", "evaluation.tasks",
                     "evaluation.verification", "training.progress", "training.steering", "pruning.methods",
                     "pruning.validate", "workbench.client", "workbench.recorded", "workbench.transcript",
                     "workbench.weighing")  # fmt: skip


def imports(file: Path) -> set[str]:
    """Top-level names of everything that `file` imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {a.name.partition(".")[0] for a in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def loaded_by(statement: str, packages: tuple[str, ...] = HEAVY) -> set[str]:
    """Which of `packages` a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport sys\nprint(*[m for m in {packages!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()) if done.stdout.strip() else set()


def test_no_streamlit_in_the_core():
    assert [f.name for f in CORE if "streamlit" in imports(f)] == []


def module(file: Path) -> str:
    """`surgery.stack` for a file of the core."""
    return ".".join(file.relative_to(ROOT / "trsp_core").with_suffix("").parts).removesuffix(".__init__")


def package(name: str) -> str:
    return name.partition(".")[0] if "." in name or (ROOT / "trsp_core" / name).is_dir() else ""


def graph() -> dict[str, set[str]]:
    """The modules of the core that each of them imports, wherever in it, and be it for types alone."""
    names = {module(file) for file in CORE}
    edges: dict[str, set[str]] = {}
    for file in CORE:
        found = edges.setdefault(module(file), set())
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.removeprefix("trsp_core.") for alias in node.names}
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("trsp_core."):
                base = f"{node.module}.".removeprefix("trsp_core.")
                for alias in node.names:
                    found.add(base + alias.name if base + alias.name in names else base.removesuffix("."))
        edges[module(file)] = (found & names) - {module(file), "", "__init__"}
    return edges


def test_every_package_imports_only_what_stands_below_it():
    rank = {name: n for n, names in enumerate(RANKS) for name in names}
    upward = [
        f"{name} imports {other}"
        for name, others in graph().items()
        if not name.startswith("__")
        for other in others
        if package(name) != package(other) and rank[package(other)] >= rank[package(name)]
    ]
    assert upward == []


def test_charts_need_the_schema_alone():
    assert {package(o) for n, others in graph().items() if package(n) == "charts" for o in others} <= {
        "", "schema", "charts"
    }  # fmt: skip


def test_the_core_is_read_in_one_evening():
    """The method itself: the run, both stages, and what is done to a model."""
    beside = ("pruning.methods", "pruning.transfers", "surgery.quantization", "surgery.lora")
    files = [f for f in CORE if package(module(f)) in ("pruning", "surgery") and not module(f).startswith(beside)]
    assert sum(len(f.read_text("utf-8").splitlines()) for f in files) <= 1600
    functions = [n for f in files for n in ast.walk(ast.parse(f.read_text("utf-8"))) if isinstance(n, ast.FunctionDef)]
    assert [n.name for n in functions if (n.end_lineno or 0) - n.lineno >= 60] == []


def test_no_files_import_each_other_in_a_circle():
    graphlib.TopologicalSorter(graph()).prepare()  # raises CycleError


def page_imports() -> dict[str, set[str]]:
    """The modules of `pages/ui` that each of them imports, as `charts.drawing`."""
    names = {".".join(f.relative_to(ROOT / "pages/ui").with_suffix("").parts): f for f in PAGES if "ui" in f.parts}
    edges: dict[str, set[str]] = {}
    for name, file in names.items():
        nodes = [n for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.ImportFrom)]
        imported = {f"{n.module}.{alias.name}" for n in nodes for alias in n.names} | {str(n.module) for n in nodes}
        edges[name] = {other.removeprefix("pages.ui.") for other in imported if "pages.ui." in other} & set(names)
    return edges


def test_packages_of_pages_import_only_what_stands_below_them():
    rank = {name: n for n, names in enumerate(PAGE_RANKS) for name in names}
    edges = page_imports()
    graphlib.TopologicalSorter(edges).prepare()  # raises CycleError
    upward = [
        f"{name} imports {other}"
        for name, others in edges.items()
        for other in others
        if name.partition(".")[0] != other.partition(".")[0]
        and rank[other.partition(".")[0]] >= rank[name.partition(".")[0]]
    ]
    assert upward == []


def test_what_pages_draw_is_worked_out_without_streamlit():
    """Frames, specifications and sentences: a notebook, a report or a test has them without a page."""
    modules = [name for name in page_imports() if name.startswith(PAGES_WITHOUT_STREAMLIT)]
    modules = [name for name in modules if name not in ("charts.drawing", "charts.__init__")]
    assert len(modules) > 12
    assert loaded_by("\n".join(f"import pages.ui.{name}" for name in modules), ("streamlit",)) == set()


def test_packages_without_torch_load_none():
    modules = [module(f) for f in CORE if package(module(f)) in TORCH_FREE and not module(f).startswith("__")]
    modules = [name for name in [*modules, *TORCH_FREE_BESIDE] if name]
    assert len(modules) > 50
    assert loaded_by("\n".join(f"import trsp_core.{name}" for name in modules)) == set()


def test_the_app_and_all_pages_load_no_torch():
    modules = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in PAGES if "ui" in f.parts]
    assert len(modules) > 40
    assert loaded_by("\n".join(f"import {m}" for m in modules)) == set()
    assert [f.name for f in [ROOT / "app.py", *PAGES] if imports(f) & set(HEAVY)] == []


def test_every_knob_says_what_it_is():
    for name, knob in config.KNOBS.items():
        assert knob.group in config.GROUPS, name
        assert knob.help.endswith("."), name
        assert "!" not in knob.label + knob.help, name
        assert knob.label[0].isupper() or knob.label[0] in "λ", f"{name}: sentence case"
        assert knob.label.upper() != knob.label, name
        if knob.kind in (int, float) and name != "seed":  # a higher seed is another one, and nothing else
            assert "igher:" in knob.help, f"{name}: the help must say what happens when it goes up"
        if knob.kind is bool:
            assert "hen on" in knob.help, f"{name}: the help must say what happens when it is on"
        missing = [choice for choice in knob.choices if name != "method" and choice not in knob.help]
        assert not missing, f"{name}: the help must say what {missing} do"


def test_no_prints_in_the_core_outside_the_shell():
    for file in CORE:
        if file.parent.name != "cli":
            calls = [n for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.Call)]
            assert not [c for c in calls if getattr(c.func, "id", "") == "print"], file.name


def test_no_yield_inside_a_grad_mode():
    """Compute inside no_grad, yield outside it: the mode would leak into whoever reads the events."""
    modes = {"no_grad", "inference_mode", "enable_grad", "set_grad_enabled"}
    for file in CORE:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.With):
                calls = [i.context_expr for i in node.items if isinstance(i.context_expr, ast.Call)]
                if modes & {getattr(c.func, "attr", "") for c in calls}:
                    inside = [n for n in ast.walk(node) if isinstance(n, (ast.Yield, ast.YieldFrom))]
                    assert not inside, f"{file.name}:{node.lineno}"


def test_pages_are_thin_and_the_session_has_one_door():
    for file in PAGES:
        source = file.read_text("utf-8")
        if file.parent.name == "views":
            assert len(source.splitlines()) <= 100, file.name
        if file.name != "session.py":
            assert "session_state" not in source, file.name
        assert "unsafe_allow_html" not in source, file.name
        if file.name != "server.py":  # which knows what a visitor of a demo may see
            assert "store().runs()" not in source, file.name


def test_no_module_is_named_for_nothing():
    refused = {"utils", "helpers", "common", "manager", "misc"}
    assert not [f for f in CORE + PAGES if f.stem in refused]


def test_safe_loading_everywhere():
    code = "\n".join(f.read_text("utf-8") for f in CORE)
    assert "trust_remote_code=True" not in code
    assert "import pickle" not in code
    assert "torch.load" not in code
    assert "torch.save" not in code


PATCHES = ("setattr", "delattr")
THIRD_PARTY_PRIVATE = {
    "_forward_hooks": "torch tells in no other way whether a hook was left on a module",
    "_is_avx512_bf16_supported": "torch has no public question about bfloat16 in the processor",
    "_is_amx_tile_supported": "the same",
    "_exit": "of os: a forked child ends without running what its parent registered",
}


def private_uses(file: Path) -> list[str]:
    """Names with one leading underscore that `file` takes from other modules: as attributes, in imports, and in the
    strings that `monkeypatch` is given. Those of `self` are its own."""
    tree, uses = ast.parse(file.read_text("utf-8")), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            uses.append(node.attr)
        if isinstance(node, ast.ImportFrom):
            uses += [alias.name for alias in node.names]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PATCHES:
            texts = [arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant)]
            uses += [str(text).rpartition(".")[2] for text in texts]
    return [name for name in uses if name.startswith("_") and not name.startswith("__")]


def test_tests_touch_no_private_names():
    uses = {f"{file.name}: {name}" for file in (ROOT / "tests").rglob("*.py") for name in private_uses(file)
            if name not in THIRD_PARTY_PRIVATE}  # fmt: skip
    assert uses == set()


def names_in(file: Path) -> set[str]:
    """What `file` defines or assigns: functions, classes, arguments, variables, attributes, fields."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.arg):
            names.add(node.arg)
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


PARTICIPLES = {"found", "made", "told", "kept", "given", "asked", "seen", "written", "left", "drawn", "shown"}
# Fields of records and recorded events, whose files stay readable; and the colour of the fate "kept".
RECORDED = {"grid_results: made", "plan_results: made", "events: kept", "messages: kept", "run_state: kept",
            "palette: kept"}  # fmt: skip


def test_variables_are_nouns():
    """Names that say that something was done, and not what it is."""
    names = {(file.stem, name.strip("_")) for file in [*CORE, *PAGES] for name in names_in(file)}
    assert {f"{stem}: {name}" for stem, name in names if name in PARTICIPLES} == RECORDED


# Of the glossary in docs/architecture.md: where these words may stand in a name. `events` has a recorded field.
WORDS = {
    "card": (),
    "place": ("export_queue", "client", "exports", "run_status", "events"),
    "plan": ("experiments/", "cli/", "compare", "limits", "server", "evidence", "faq", "plan_runs", "plan_tab"),
    "sweep": ("experiments/", "charts/", "evidence/"),
}


def test_words_of_the_glossary_mean_one_thing():
    for file in [*CORE, *PAGES]:
        words = {word.removesuffix("s") for name in names_in(file) for word in name.lower().split("_")}
        for word in words & set(WORDS):
            where = f"{file.parent.name}/{file.stem}"
            assert any(part in (file.stem, f"{file.parent.name}/") for part in WORDS[word]), f"{word} in {where}"


def test_no_two_classes_have_one_name():
    nodes = [node for file in [*CORE, *PAGES] for node in ast.walk(ast.parse(file.read_text("utf-8")))]
    names = [node.name for node in nodes if isinstance(node, ast.ClassDef)]
    assert [name for name in set(names) if names.count(name) > 1] == []
