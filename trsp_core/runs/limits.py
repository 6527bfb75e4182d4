"""What a server lets its visitors ask for, all of it here: values, and the checks that every entry makes on its own,
whatever a page has drawn. Imports no torch.

`TRSP_DEMO=1` turns the limits of a public demo on. Without it the app is for the person at the machine, and only what
protects the app from accidents is limited. A word that says neither is refused, never guessed.

What is limited by visitor is limited by address, since tabs cost nothing: see `visitor`.
"""

from __future__ import annotations

import ipaddress
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trsp_core import formatting
from trsp_core.schema import messages
from trsp_core.models import catalog
from trsp_core.schema.messages import Request
from trsp_core.schema.config import KNOBS, RunConfig
from trsp_core.errors import Problem, TrspError, refuse

HOW = "To run it without limits, install it on your own machine: see README.md."
SWITCH = "TRSP_DEMO"
ON, OFF = ("1", "true", "yes", "on", "demo"), ("", "0", "false", "no", "off", "open")
PROXIES = "FORWARDED_ALLOW_IPS"  # of uvicorn, which reads the header X-Forwarded-For of these alone


@dataclass(frozen=True)
class Limits:
    """The limits of one server.

    Attributes:
        demo: strangers use it: models and texts from lists alone, no hub, no local paths, no pushing, no plans, and a
            run is seen by those who have its address.
        models, texts: names that may be used; empty where any may.
        parameters: of the largest model.
        highest: highest value by knob.
        step_tokens: tokens of one training step.
        minutes: of a run, from its start. `pause_minutes`: of a pause in it, after which it goes on by itself.
        prompt, new_tokens: characters read and tokens written by one request.
        upload_bytes, stored_bytes: of one uploaded text, and of all of them.
        visitor_bytes, held_bytes: of the texts that one visitor has stored or is uploading, and of all files that are
            in memory or on their way there.
        unread_hours: age at which a text that no run reads is deleted.
        queue_capacity, workers: runs that may wait, and that run at once.
        runs_per_visitor, requests_per_visitor, exports_per_visitor: that one may have waiting or running.
        connections_per_visitor: open ones, at least one for each tab.
        workbench_yields: the workbench takes only what a run leaves of the cores: there is one machine for all, and who
            toggles layers is not who waits for the run.
        export_capacity, export_minutes: exports and reports that may wait, and how long one may take; one is made at a
            time.
        days, disk_bytes: age and size from which on runs are deleted; see `retention`.
    """

    demo: bool = False
    models: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    parameters: float = math.inf
    highest: Mapping[str, float] = field(default_factory=dict)
    step_tokens: float = math.inf
    minutes: float = math.inf
    pause_minutes: float = math.inf
    prompt: float = math.inf
    new_tokens: float = math.inf
    upload_bytes: int = 20_000_000
    stored_bytes: int = 500_000_000
    visitor_bytes: float = 500_000_000
    held_bytes: float = 100_000_000
    unread_hours: float = 24.0
    queue_capacity: int = 8
    workers: int = 1
    runs_per_visitor: float = math.inf
    requests_per_visitor: float = math.inf
    exports_per_visitor: float = math.inf
    connections_per_visitor: float = math.inf
    workbench_yields: bool = False
    export_capacity: int = 16
    export_minutes: float = 240
    days: float = math.inf
    disk_bytes: float = math.inf

    @property
    def deletes_runs(self) -> bool:
        return math.isfinite(self.days) or math.isfinite(self.disk_bytes)

    def check_run(self, config: RunConfig, root: Path) -> list[Problem]:
        """What is beyond the limits; `root` is the folder of runs, which holds the uploaded texts too."""
        if not self.demo:
            return []
        problems = [
            Problem(name, f"{KNOBS[name].label}: {formatting.setting(getattr(config, name))} was given, a demo allows {formatting.setting(most)}.",
                    f"Take {formatting.setting(most)} or less. {HOW}")
            for name, most in self.highest.items() if getattr(config, name) > most
        ]  # fmt: skip
        problems += self.check_model(config.model)
        if config.model in self.models and (size := _parameters(config.model)) > self.parameters:
            problems.append(Problem("model", f"A model of {formatting.parameters(size)} parameters is too large here.", HOW))
        for name in ("text", "heldout"):
            if not self._may_read(getattr(config, name), root):
                problems.append(
                    Problem(
                        name, "A demo does not read this text.", f"Take {' or '.join(self.texts)}, or bring a file."
                    )
                )
        tokens = config.batch_blocks * config.block_length
        if tokens > self.step_tokens:
            problems.append(
                Problem("batch_blocks", f"A step of {formatting.count(tokens)} tokens was asked for, a demo allows "
                        f"{formatting.count(self.step_tokens)}.", "Take fewer or shorter blocks.")
            )  # fmt: skip
        if len(config.prompt) > self.prompt:
            problems.append(
                Problem("prompt", f"The prompt has {formatting.count(len(config.prompt))} characters, {formatting.count(self.prompt)} are allowed.",
                        "Shorten it.")
            )  # fmt: skip
        return problems

    def check_model(self, name: str) -> list[Problem]:
        """What forbids a model, by its name alone. It is asked before the disk, whose answer would tell what is there."""
        if not self.demo or name in self.models:
            return []
        return [Problem("model", "A demo does not use this model.", f"Take {' or '.join(self.models)}. {HOW}")]

    def check_request(self, request: Request, root: Path) -> None:
        """Raises TrspError: the workbench is asked for something beyond the limits."""
        if not self.demo:
            return
        problems: list[Problem] = []
        prompt, new_tokens = getattr(request, "prompt", ""), getattr(request, "new_tokens", 0)
        for text in (prompt, getattr(request, "text", "") if isinstance(request, messages.Trace) else ""):
            if len(text) > self.prompt:
                message = f"{formatting.count(len(text))} characters were given, a demo reads {formatting.count(self.prompt)}."
                problems.append(Problem("prompt", message, "Shorten the text."))
        if new_tokens > self.new_tokens:
            message = f"{formatting.count(new_tokens)} tokens were asked for, a demo writes {formatting.count(self.new_tokens)}."
            problems.append(Problem("new_tokens", message, "Ask for fewer."))
        for name in _models_of(request):
            if name not in self.models and not _is_inside(name, root):
                problems.append(Problem("model", "A demo does not use this model.", f"Take {' or '.join(self.models)}."))
        if isinstance(request, messages.WhatIf | messages.Importance | messages.Influence | messages.Prepare):
            for text in filter(None, (request.text, request.heldout)):
                if not self._may_read(text, root):
                    problems.append(Problem("text", "A demo does not read this text.", "Take one that it offers."))
        refuse(problems)

    def refuse_hub(self, name: str = "") -> None:
        """Raises TrspError: this server does not ask the hub, or not for this model."""
        if self.demo and name not in self.models:
            raise TrspError("A demo uses only the models that it names.", f"Take {' or '.join(self.models)}. {HOW}")

    def refuse_push(self) -> None:
        """Raises TrspError: this server uploads nothing."""
        if self.demo:
            raise TrspError("A demo uploads nothing.", f"Download the folder and push it yourself. {HOW}")

    def refuse_plans(self) -> None:
        """Raises TrspError: this server works through no plans."""
        if self.demo:
            raise TrspError("A demo works through no plans: they take hours.", HOW)

    def refuse_upload(self, size: int) -> None:
        """Raises TrspError: the file is too large."""
        if size > self.upload_bytes:
            allowed = f"{formatting.size(self.upload_bytes)} are allowed"
            raise TrspError(f"The file has {formatting.size(size)}, {allowed}.", "Bring a part of it.")

    def refuse_stored(self, size: int, own: int, stored: int) -> None:
        """Raises TrspError: there is no room for `size` bytes beside what this visitor and all have stored."""
        if own + size > self.visitor_bytes:
            raise TrspError("Your share of the space for uploaded texts is used up.", "Use one that you have brought.")
        if stored + size > self.stored_bytes:
            wait = f"Try again in {formatting.setting(self.unread_hours)} hours, when what no run reads is deleted."
            raise TrspError("The space for uploaded texts is used up.", wait)

    def refuse_run(self, active: int) -> None:
        """Raises TrspError: this visitor has as many runs waiting or running as one may have."""
        if active >= self.runs_per_visitor:
            raise TrspError(
                "A run from your network address is not over yet, and one at a time is possible here.",
                "Wait for it, or stop it if it is yours.",
            )

    def refuse_request(self, waiting: int) -> None:
        """Raises TrspError: this visitor has as many requests waiting at the workbench as one may have."""
        if waiting >= self.requests_per_visitor:
            message = f"{waiting} requests from your network address are waiting for the workbench."
            raise TrspError(message, "Try again when some of them have been answered.")

    def refuse_export(self, waiting: int) -> None:
        """Raises TrspError: this visitor has as many exports and reports waiting as one may have."""
        if waiting >= self.exports_per_visitor:
            message = f"{waiting} exports or reports from your network address are waiting."
            raise TrspError(message, "Try again when one of them is there.")

    def in_words(self) -> str:
        """What a visitor should know: a sentence or two; nothing in the open mode."""
        if not self.demo:
            return ""
        return (
            f"This is a public demo: {' and '.join(self.models)}, {formatting.setting(self.highest['stage2_steps'])} steps of stage 2, "
            f"{formatting.setting(self.minutes)} minutes a run, one run at a time from one network address; a run is deleted after "
            f"{formatting.setting(self.days)} days. Its address is the only way back to it."
        )

    def _may_read(self, text: str, root: Path) -> bool:
        """Whether a text may be read. The disk is asked only about a name that is among the uploaded texts."""
        return text in self.texts or (Path(text).parent == root / "uploads" and _is_inside(text, root / "uploads"))


OPEN = Limits()
DEMO = Limits(
    demo=True,
    models=("smollm2-135m", "gemma3-270m"),
    texts=("wikipedia", "news"),
    parameters=300_000_000,
    highest={
        "stage1_steps": 20,
        "stage1_stretch": 4,
        "shortlist": 8,
        "stage2_steps": 240,
        "cycles": 4,
        "batch_blocks": 4,
        "block_length": 256,
        "calibration_blocks": 512,
        "score_blocks": 16,
        "measure_blocks": 32,
        "measure_length": 512,
        "kl_blocks": 8,
        "probe_blocks": 8,
        "importance_blocks": 4,
        "speed_repeats": 10,
        "sample_tokens": 64,
        "adapter_rank": 64,
        "threads": 2,
    },
    step_tokens=1024,
    minutes=45,
    pause_minutes=3,
    prompt=1000,
    new_tokens=128,
    workbench_yields=True,
    upload_bytes=2_000_000,
    stored_bytes=100_000_000,
    visitor_bytes=10_000_000,
    held_bytes=40_000_000,
    unread_hours=2.0,
    runs_per_visitor=1,
    requests_per_visitor=12,
    exports_per_visitor=2,
    connections_per_visitor=100,
    export_capacity=6,
    export_minutes=10,
    days=7,
    disk_bytes=20e9,
)


def current() -> Limits:
    """Those of this process, as `TRSP_DEMO` says.

    Raises:
        TrspError: it says neither on nor off.
    """
    word = os.environ.get(SWITCH, "").strip().lower()
    if word in ON or word in OFF:
        return DEMO if word in ON else OPEN
    raise TrspError(
        f"{SWITCH} is {word[:40]!r}, which says neither on nor off.",
        f"Set {SWITCH}=1 for the limits of a demo, or {SWITCH}=0 for none.",
    )


def check_environment() -> None:
    """Raises TrspError: a variable that decides over limits cannot be understood, or undoes them."""
    demo = current().demo
    for word in filter(None, (word.strip() for word in os.environ.get(PROXIES, "").split(","))):
        if word == "*":
            if demo:
                message = f"{PROXIES} is *, so every visitor of this demo could write his own address."
                raise TrspError(message, f"Name the addresses of the proxy, such as {PROXIES}=10.0.0.0/8.")
            continue
        try:
            ipaddress.ip_network(word)
        except ValueError as error:
            message = f"{PROXIES} names {word[:60]!r}, which is no address and no network."
            raise TrspError(message, "Write addresses or networks, such as 10.0.0.0/8, with commas between.") from error


def visitor(address: str | None, forwarded: bool) -> str:
    """Who somebody is to the limits: the address that he comes from, however many tabs he opens.

    In IPv6 it is the network of 2^72 addresses that a household or a hired machine gets. All whose address is not known
    are one visitor together; so are those behind a proxy that is not named in `PROXIES`, whose word does not count.

    Args:
        address: of the client, after the named proxies; None where nothing tells it.
        forwarded: whether the request has a header X-Forwarded-For.
    """
    if forwarded and not os.environ.get(PROXIES, "").strip():
        return "behind a proxy"
    try:
        network_address = ipaddress.ip_address((address or "").split("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(network_address, ipaddress.IPv6Address):
        if not network_address.ipv4_mapped:
            return "here" if network_address.is_loopback else str(ipaddress.ip_network((network_address, 56), strict=False))
        network_address = network_address.ipv4_mapped
    return "here" if network_address.is_loopback else str(network_address)


def _parameters(name: str) -> int:
    """Of a model, 0 where they are not known yet."""
    try:
        return catalog.facts(name).parameters
    except TrspError:
        return 0


def _models_of(request: Request) -> list[str]:
    """Names and folders of all models that `request` would open."""
    if isinstance(request, messages.WhatIf | messages.Prepare):
        return [request.model]
    one = [request.model] if isinstance(request, messages.Importance | messages.Influence) else []
    variants = request.columns if isinstance(request, messages.Generate | messages.Trace) else one
    return [name for variant in variants for name in (variant.model, variant.base) if name]


def _is_inside(name: str, root: Path) -> bool:
    """Whether a path leads into a folder, by its name and then, links followed, on the disk."""
    try:
        if not Path(name).is_relative_to(root):
            return False
        real = Path(name).resolve()
        return real != root.resolve() and real.is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError):
        return False
