"""From what hosts answered to what is wrong: one line a problem, saying where, what, and what to do. No host is asked here."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m2mkd_ds.train.launching.cluster_doctor.ask import Answer

MAX_CLOCK_S = 2.0
MIN_FREE_GIB = 2.0


@dataclass(frozen=True)
class Expected:
    """What every host must agree with: the host that asks, the hostfile and the run."""

    versions: Mapping[str, str]
    python: str
    executable: str
    slots: Mapping[str, int]
    token: str
    run_dir: str = ""
    shards: Mapping[str, str] | None = None
    """{train, validation: fingerprint}, as the asking host sees them."""


def problems_of(answer: Answer, expected: Expected) -> list[str]:
    """Lines `HOST: what is wrong; what to do`, the most basic first; empty for a sound host."""
    facts = answer.facts
    if facts is None:
        return [f"{answer.host}: {_WHY[answer.failed_at].format(python=expected.executable, reason=answer.reason)}"]
    found = [*_version_problems(facts, expected), *_machine_problems(answer, facts, expected), *_folder_problems(facts, expected)]
    return [f"{answer.host}: {line}" for line in found]


_WHY = {
    "ssh": "not reached by ssh ({reason}); it must be up and let this user in by a key, without a question",
    "python": "{python} cannot be started ({reason}); the environment must lie under the same path on every host",
    "package": "m2mkd_ds does not run there ({reason}); the checkout must lie under the same path, or be installed in the same environment",
}


def notes_of(answer: Answer) -> list[str]:
    """What is no problem, because it is handled, and still good to know."""
    if answer.facts is None:
        return []
    names, route = answer.facts["own_name"], answer.facts["route"]
    if isinstance(names, list) and "interface" in route and all(ipaddress.ip_address(name).is_loopback for name in names):
        where = ", ".join(names)
        return [f"{answer.host}: its own name means {where}, which gloo alone would take; ranks are told {route['interface']}"]
    return []


def _version_problems(facts: Mapping[str, Any], expected: Expected) -> list[str]:
    found = []
    if facts["python"] != expected.python:
        found.append(f"Python {facts['python']} and here {expected.python}; use one environment on all hosts")
    for name, ours in expected.versions.items():
        theirs = facts["versions"].get(name, "absent")
        if theirs != ours:
            found.append(f"{name} {theirs} and here {ours}; install the same version on all hosts")
    return found


def _machine_problems(answer: Answer, facts: Mapping[str, Any], expected: Expected) -> list[str]:
    found = []
    if abs(answer.clock_s) > MAX_CLOCK_S:
        ahead = "ahead of" if answer.clock_s > 0 else "behind"
        found.append(f"its clock is {abs(answer.clock_s):.1f} s {ahead} ours; set it (chrony or ntp), or times in logs will lie")
    slots, gpus = expected.slots[answer.host], facts["gpus"]
    if isinstance(gpus, Mapping):
        found.append(f"torch does not work ({gpus['error']}); mend the environment there")
    elif gpus and slots > gpus:
        found.append(f"slots={slots} but {gpus} GPUs; correct the hostfile")
    elif not gpus and slots > facts["cores"]:
        found.append(f"slots={slots} but no GPU and {facts['cores']} cores; correct the hostfile")
    if "error" in facts["route"]:
        found.append(f"{facts['route']['error']} (route to the first host)")
    return found


def _folder_problems(facts: Mapping[str, Any], expected: Expected) -> list[str]:
    found = []
    folder = facts["run_dir"]
    if folder is not None and "error" in folder:
        found.append(f"run folder {expected.run_dir}: {folder['error']}; it must be one folder that every host sees and can write")
    elif folder is not None and folder["seen"] != expected.token:
        found.append(f"run folder {expected.run_dir}: another file of the same name there; every host must see one folder")
    elif folder is not None and folder["free_gib"] < MIN_FREE_GIB:
        found.append(f"run folder {expected.run_dir}: {folder['free_gib']:.1f} GiB free; make room for checkpoints")
    for part, ours in (expected.shards or {}).items():
        theirs = facts[part]
        if isinstance(theirs, Mapping):
            found.append(f"data.{part}: {theirs['error']}; the shards must be seen under the same path or address on every host")
        elif theirs is not None and theirs != ours:
            found.append(f"data.{part}: other shards than here; every host must read the same")
    return found


COLUMNS = ("host", "slots", "ssh", "python", "m2mkd_ds", "torch", "deepspeed", "clock", "GPUs", "cores", "network", "run folder", "shards")


def table_row(answer: Answer, expected: Expected) -> tuple[str, ...]:
    """A host's line of the table; `-` for what was not asked or not learnt."""
    slots, facts = str(expected.slots[answer.host]), answer.facts
    if facts is None:
        return (answer.host, slots, "no" if answer.failed_at == "ssh" else "yes", *("-" for _ in COLUMNS[3:]))
    versions, folder, route = facts["versions"], facts["run_dir"], facts["route"]
    shards = [facts[part] for part in ("train", "validation") if facts[part] is not None]
    return (
        answer.host,
        slots,
        "yes",
        facts["python"],
        *(versions.get(name, "absent") for name in ("m2mkd_ds", "torch", "deepspeed")),
        f"{answer.clock_s:+.1f} s" if answer.clock_s else "same",
        "?" if isinstance(facts["gpus"], Mapping) else str(facts["gpus"]),
        str(facts["cores"]),
        "no route" if "error" in route else f"{route['interface']} {route['address']}",
        "-" if folder is None else "no" if "error" in folder or folder["seen"] != expected.token else f"{folder['free_gib']:.0f} GiB free",
        "-" if not shards else "no" if any(isinstance(part, Mapping) for part in shards) else "yes",
    )


def format_rows(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, each as wide as its widest word."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{word:{width}}" for word, width in zip(row, widths, strict=True)).rstrip() for row in rows)
