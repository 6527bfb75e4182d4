"""What people with other eyes and hands meet: colours by their contrast and under colour blindness, names and
descriptions of what is drawn, and axe-core over every page in a real browser."""

from __future__ import annotations

import ast
import itertools
import json
import math
import re
import tomllib

import pytest

from pages.ui.style.theme import ON_LIGHT_BLUE
from tests import ROOT
from tests.browser.drawn import until_drawn
from trsp_core.charts.palette import PALETTES

THEME = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text())["theme"]

# Rules that are left out, each for a fault of Streamlit's own markup that no app can mend.
STREAMLITS_OWN: dict[str, str] = {}


def luminance(colour: str) -> float:
    """WCAG's relative luminance of `#RRGGBB`."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio, 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_contrast_is_wcags():
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)
    assert contrast("#777777", "#FFFFFF") == pytest.approx(4.48, abs=0.01)


def mixed(colour: str, ground: str, share: float) -> str:
    """`colour` laid over `ground` with this opacity."""
    pairs = [(int(colour[i : i + 2], 16), int(ground[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(share * c + (1 - share) * g):02X}" for c, g in pairs)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_stands_out_from_its_ground(mode):
    """AA everywhere, AAA for running text. Streamlit's captions have 60 % of the text's colour, and what is selected
    has the primary colour on a tenth of it."""
    theme, palette = THEME[mode], PALETTES[mode]
    primary, ground = theme.get("primaryColor", THEME["primaryColor"]), theme["backgroundColor"]
    for below in (ground, theme["secondaryBackgroundColor"]):
        assert contrast(theme["textColor"], below) >= 7
        assert contrast(palette.ink, below) >= 7
        assert contrast(mixed(theme["textColor"], below, 0.6), below) >= 4.5
        assert contrast(primary, below) >= 4.5
    assert contrast(primary, mixed(primary, ground, 0.1)) >= 4.5
    written = "#FFFFFF" if mode == "light" else re.search(r"color:(#\w{6})", ON_LIGHT_BLUE)[1]
    assert contrast(written, primary) >= 4.5, "letters on a button"


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_what_is_drawn_stands_out_from_its_ground(mode):
    """AA for graphics: 3 to 1. On the light ground the orange of chosen layers has 2 to 1 alone, and the pink of a
    penalty just under 3: both stand beside a number or a name wherever they mean something."""
    ground, palette = THEME[mode]["backgroundColor"], PALETTES[mode]
    less = {"chosen": 2.0, "pull": 2.9}
    for meaning in ("kept", "chosen", "removed", "dense", "pruned", "pull", "ink"):
        assert contrast(getattr(palette, meaning), ground) >= less.get(meaning, 3), meaning


# What people without one kind of cone see: Machado, Oliveira and Fernandes 2009, severity 1, of linear RGB.
EYES = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}
TOGETHER = (("kept", "chosen", "removed"), ("dense", "pruned", "kept"), ("pruned", "pull"), ("dense", "removed"))


def lab(colour: str, eye: str) -> tuple[float, float, float]:
    """CIELAB (D65) of `#RRGGBB` as this eye sees it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    seen = [min(max(sum(m * v for m, v in zip(row, linear, strict=True)), 0), 1) for row in EYES[eye]]
    to_xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    white = (0.95047, 1.0, 1.08883)
    f = []
    for row, top in zip(to_xyz, white, strict=True):
        t = sum(m * v for m, v in zip(row, seen, strict=True)) / top
        f.append(t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116)
    return 116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])


def test_the_simulation_knows_what_such_eyes_confuse():
    red, green = "#C00000", "#5A7A00"
    assert math.dist(lab(red, "all cones"), lab(green, "all cones")) > 80
    assert math.dist(lab(red, "deuteranopia"), lab(green, "deuteranopia")) < 40
    assert lab("#FFFFFF", "all cones") == pytest.approx((100, 0, 0), abs=0.1)


@pytest.mark.parametrize("eye", EYES)
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_meanings_that_stand_together_are_told_apart_by_every_eye(mode, eye):
    """At least 15 apart in CIELAB, where 2.3 can just be seen."""
    palette = PALETTES[mode]
    for group in TOGETHER:
        for one, other in itertools.combinations(group, 2):
            apart = math.dist(*(lab(getattr(palette, name), eye) for name in (one, other)))
            assert apart >= 15, (one, other, round(apart, 1))


SAID = {  # calls that show words, and which of their arguments do
    "st": {"title", "header", "subheader", "markdown", "caption", "info", "warning", "error", "success", "button",
           "toggle", "selectbox", "slider", "number_input", "text_input", "text_area", "segmented_control", "pills",
           "multiselect", "popover", "expander", "checkbox", "page_link", "download_button", "file_uploader", "metric",
           "link_button", "radio", "badge", "pagination"},
}  # fmt: skip
CONTROLS = SAID["st"] - {"title", "header", "subheader", "markdown", "caption", "info", "warning", "error", "success",
                         "badge", "pagination"}  # fmt: skip
NAMES = ("TRSP", "HTML", "CSV", "KL", "GGUF", "ShortGPT", "GPU", "Markdown", "JSON")


def shown() -> list[tuple[str, str, str]]:
    """`(file, call, literal)` of every fixed text that a page shows."""
    found = []
    for file in sorted((ROOT / "pages").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            call = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            if call in SAID["st"] and isinstance(node.func.value, ast.Name) and node.func.value.id == "st":
                words = [a for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
                found += [(file.name, call, w.value) for w in words if isinstance(w.value, str)]
    return found


def test_no_text_shouts():
    assert len(shown()) > 100
    for file, call, text in shown():
        assert "!" not in text, (file, call, text)


def test_labels_are_in_sentence_case():
    """A capital within a label belongs to a name."""
    for file, call, text in shown():
        if call in {"header", "subheader", "title", "button", "toggle", "popover", "expander", "page_link"}:
            plain = re.sub(r":material/\w+:|[*#“”]|\$[^$]*\$", " ", text)
            for name in NAMES:
                plain = plain.replace(name, "")
            inner = [word for word in plain.split()[1:] if word[:1].isupper()]
            after = re.findall(r"[.:?] ([A-Z]\w*)", plain)
            assert set(inner) <= {*after, "Layers", "Compare", "Evidence", "Runs"}, (file, call, text)


def test_every_control_has_a_label_and_every_chart_and_table_a_description():
    for file in sorted((ROOT / "pages").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "st"):
                continue
            given = {k.arg for k in node.keywords}
            if node.func.attr in CONTROLS:
                first = node.args[0] if node.args else next((k.value for k in node.keywords if k.arg == "label"), None)
                if node.func.attr != "page_link":
                    assert first is not None, f"{file.name}:{node.lineno}"
                assert not (isinstance(first, ast.Constant) and not str(first.value).strip()), (
                    f"{file.name}:{node.lineno}"
                )
            if node.func.attr in ("vega_lite_chart", "altair_chart", "dataframe", "image"):
                assert given & {"alt", "caption"}, f"{file.name}:{node.lineno} has no description"


VIEWS = {
    "home": "",
    "form": "run",
    "a run": "run?run={run}",
    "layers": "layers?run={run}",
    "what-if": "layers?run={run}&layers-part=Try+it+yourself",
    "knowledge": "layers?run={run}&layers-part=Where+the+knowledge+went",
    "compare": "compare?run={run}",
    "splits": "evidence",
    "ablation": "evidence?evidence-part=Does+the+knowledge+move%3F",
    "methods": "evidence?evidence-part=Which+layers%3F",
    "settings": "evidence?evidence-part=How+the+settings+matter",
    "published": "evidence?evidence-part=Published+figures",
    "runs": "runs",
    "paper": "paper",
}


@pytest.fixture(scope="module")
def told(served):
    """A finished run in the server's folder."""
    from tests import story
    from trsp_core.runs.store import Store

    return story.write(Store(served.runs), "finished")


@pytest.mark.browser
@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_axe_has_no_serious_finding(served, browser, told, view, mode):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    context = browser.new_context(viewport={"width": 1280, "height": 720}, color_scheme=mode)
    context.set_default_timeout(600_000)
    try:
        page = context.new_page()
        page.goto(f"{served.url}/{VIEWS[view].format(run=told.id)}")
        until_drawn(page)
        assert page.locator("[data-testid=stException]").count() == 0
        found = axe.run(page, options={"resultTypes": ["violations"]}).response["violations"]
    finally:
        context.close()
    told_of = {
        rule["id"]: [f"{node['target']} {' '.join(node['failureSummary'].split())[:300]}" for node in rule["nodes"][:6]]
        for rule in found
        if rule["impact"] in ("serious", "critical") and rule["id"] not in STREAMLITS_OWN
    }
    assert told_of == {}, json.dumps(told_of, indent=1)


@pytest.mark.browser
def test_a_link_is_made_by_keyboard_and_shows_the_same_form(served, browser):
    contexts = [browser.new_context(viewport={"width": 1280, "height": 720}) for _ in range(2)]
    try:
        sender, receiver = (context.new_page() for context in contexts)
        for page in (sender, receiver):
            page.set_default_timeout(600_000)
        sender.goto(f"{served.url}/run?ratio=0.3&gate=output")
        strength = sender.get_by_role("spinbutton", name="λ₁")
        strength.fill("0.125")
        strength.press("Enter")
        sender.wait_for_url("**lambda_1=0.125**")
        sender.get_by_role("button", name="Copy link").press("Enter")
        link = sender.locator("[data-testid=stCode] code").first.inner_text()
        assert link == sender.url
        receiver.goto(link)
        shown = receiver.get_by_role("spinbutton", name="λ₁")
        shown.wait_for()
        assert float(shown.input_value()) == 0.125
        receiver.wait_for_url("**gate=output**")
        assert "ratio=0.3" in receiver.url
    finally:
        for context in contexts:
            context.close()
