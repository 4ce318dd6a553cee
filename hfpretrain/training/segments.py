"""Ranges of steps that were trained under the same settings, such as engine, number of processes and device."""

from __future__ import annotations

from typing import Any


def extend(segments: list[dict[str, Any]], settings: dict[str, Any], step: int) -> None:
    """Record that `step` ran under `settings`: extend the last of `segments`, or begin another."""
    if not segments or any(segments[-1].get(key) != value for key, value in settings.items()):
        segments.append({**settings, "first_step": step})
    segments[-1]["last_step"] = step


def segments_of(environment: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """The settings of all steps up to `step`. `environment` is the content of an `environment.json`: its top level has
    the settings of the process that wrote it, and `segments` those of earlier processes."""
    found = [dict(part, last_step=min(part["last_step"], step)) for part in environment.get("segments", ())]
    found = [part for part in found if part["first_step"] <= step]
    done = found[-1]["last_step"] if found else 0
    if step > done:
        now = {**environment, "precision": environment["mixed_precision"], "first_step": done + 1, "last_step": step}
        found.append(now)
    return found


def hardware_ranges(segments: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """Engine, number of processes and device as text, with the first and the last step trained on them."""
    found: list[tuple[str, int, int]] = []
    for part in segments:
        text, first = _hardware_text(part), part["first_step"]
        if found and found[-1][0] == text:
            first = found.pop()[1]
        found.append((text, first, part["last_step"]))
    return found


def _hardware_text(part: dict[str, Any]) -> str:
    count = "" if part["num_processes"] == 1 else f" x{part['num_processes']}"
    return f"{part['engine']}{count}" + (f" on {part['device']}" if part.get("device") else "")


def change_message(before: dict[str, Any], now: dict[str, Any], step: int) -> str | None:
    """The message for a run that continues after `step` with other settings; None if they are the same."""
    if before.get("document_masking", now["document_masking"]) != now["document_masking"]:
        was, becomes = ("not masked", "masked") if now["document_masking"] else ("masked", "not masked")
        return f"packed documents are {becomes} from each other; up to step {step} they were {was}"
    if all(before.get(name, now[name]) == now[name] for name in ("engine", "num_processes", "device")):
        return None
    return f"training continues with {_hardware_text(now)}; up to step {step} it ran with {_hardware_text(before)}"
