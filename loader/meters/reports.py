"""What `CropLoader.meters` says, as a table for people, scalars for TensorBoard and text for Prometheus.

Names of metrics follow Prometheus' rules: ``foldfeed_loader_`` in front, base units (seconds, bytes) at the
end, ``_total`` for what only grows. Pure functions of plain data; owns no counting.

Source: Prometheus, "Exposition formats", text format 0.0.4; "Metric and label naming".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from foldfeed.loader.meters.histogram import RELATIVE_ERROR

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "foldfeed_loader_"
_QUANTILES = {"p50_s": "0.5", "p99_s": "0.99", "p999_s": "0.999"}
_SIZES = {
    "stored_bytes": "Bytes that the tiles of what was read take in the store.",
    "decoded_bytes": "Bytes of the cells of those tiles, a byte for a token and one for a deletion count.",
    "used_bytes": "Bytes of those cells that samples are made of.",
}
_LATENCIES = {
    "sample_read": "Planning and reading a sample, in one thread.",
    "sample_prepare": "Making the features of a sample, or copying it for a device.",
    "step_wait": "A consumer's wait for a step.",
}


class Family(NamedTuple):
    """A metric.

    Attributes:
      name: behind `PREFIX`.
      kind: ``counter``, ``gauge`` or ``summary``.
      help: what it is.
      samples: (ending of the name, labels, value).
    """

    name: str
    kind: str
    help: str
    samples: list[tuple[str, dict[str, str], float]]


def prometheus_text(meters: Mapping[str, Any], labels: Mapping[str, str] | None = None) -> str:
    """Returns meters in Prometheus' text format, content type `CONTENT_TYPE`.

    Args:
      meters: of `CropLoader.meters`.
      labels: that every sample gets, such as ``{"rank": "0"}``.
    Raises:
      ValueError: a name of a label that Prometheus does not take.
    """
    common = dict(labels or {})
    for name in common:
        if not (name.isascii() and name.isidentifier()) or name.startswith("__"):
            raise ValueError(
                f"label {name!r}: must be ASCII letters, digits and _, and begin with no digit or __"
            )
    lines: list[str] = []
    for family in filter(lambda family: family.samples, families(meters)):
        full = PREFIX + family.name
        lines += [f"# HELP {full} {_escaped(family.help)}", f"# TYPE {full} {family.kind}"]
        for ending, own, value in family.samples:
            pairs = ",".join(
                f'{name}="{_escaped(text, quote=True)}"' for name, text in (common | own).items()
            )
            lines.append(
                f"{full}{ending}{{{pairs}}} {_number(value)}" if pairs else f"{full}{ending} {_number(value)}"
            )
    return "\n".join(lines) + "\n"


def families(meters: Mapping[str, Any]) -> list[Family]:
    """Returns meters as metrics."""
    stages = meters["stages"]
    error = f"quantiles are at most {100 * RELATIVE_ERROR:g} % off"
    return [
        _counter("steps_total", "Steps received.", meters["steps"]),
        _counter("samples_total", "Samples received.", meters["samples"]),
        _counter(
            "samples_read_total",
            "Samples read, those ahead of the consumer included.",
            meters["samples_read"],
        ),
        _counter(
            "samples_substituted_total",
            "Samples received that are made from another record, because their own cannot be read.",
            meters["substituted"],
        ),
        *(_counter(f"{name}_total", text, meters[name]) for name, text in _SIZES.items()),
        _counter("wait_seconds_total", "Time that the consumer spent waiting for steps.", meters["wait_s"]),
        _counter(
            "stall_seconds_total",
            "Time that the consumer's work stood still for lack of a step.",
            meters["stall_s"],
        ),
        _labelled(
            "stage_busy_seconds_total",
            "counter",
            "Time in which threads of a stage worked.",
            "stage",
            ((name, stage["busy_s"]) for name, stage in stages.items()),
        ),
        _labelled(
            "stage_waiting_seconds_total",
            "counter",
            "Time in which threads of a stage waited.",
            "stage",
            ((name, stage["waiting_s"]) for name, stage in stages.items()),
        ),
        _labelled(
            "stage_workers",
            "gauge",
            "Threads of a stage.",
            "stage",
            ((name, stage["num_workers"]) for name, stage in stages.items()),
        ),
        Family(
            "activity_seconds_total",
            "counter",
            "Time that threads of a stage spent on an activity.",
            [
                ("", {"stage": name, "activity": activity}, spent["seconds"])
                for name, stage in stages.items()
                for activity, spent in stage["activities"].items()
            ],
        ),
        Family(
            "reading_processes",
            "gauge",
            "Processes that read samples.",
            [("", {}, meters["reading_processes"])],
        ),
        _labelled(
            "queue_length", "gauge", "What waits between stages, now.", "queue", meters["queues"].items()
        ),
        _labelled(
            "cache_total",
            "counter",
            "What the caches in front of the store did.",
            "event",
            meters["cache"].items(),
        ),
        *(
            _summary(name, f"{text} ({error})", meters["latencies"][name])
            for name, text in _LATENCIES.items()
        ),
    ]


def scalars(meters: Mapping[str, Any]) -> dict[str, float]:
    """Returns the few numbers of meters that are worth a curve, by TensorBoard's names."""
    stages = meters["stages"]
    found = {
        f"loader/busy_share/{name}": _share(stage["busy_s"], stage["lifetime_s"])
        for name, stage in stages.items()
    }
    found |= {f"loader/queue/{name}": float(length) for name, length in meters["queues"].items()}
    waits = meters["latencies"]["step_wait"]
    return found | {
        "loader/stall(s)": meters["stall_s"],
        "loader/wait_p50(s)": waits["p50_s"],
        "loader/wait_p99(s)": waits["p99_s"],
        "loader/stored(MB)": meters["stored_bytes"] / 1e6,
        "loader/decoded_per_used": _share(meters["decoded_bytes"], meters["used_bytes"]),
    }


def table(meters: Mapping[str, Any]) -> list[str]:
    """Returns meters as lines for a person."""
    used = meters["used_bytes"]
    amplified = _share(meters["decoded_bytes"], used)
    lines = [
        f"loader: {meters['samples']:,} samples in {meters['steps']:,} steps; the consumer stood still for "
        f"{meters['stall_s']:.2f} s",
        f"  read {meters['samples_read']:,} samples: {meters['stored_bytes'] / 1e6:,.2f} MB of tiles, "
        f"{meters['decoded_bytes'] / 1e6:,.2f} MB of cells, {amplified:.2f} times what was used of them",
        f"  {'stage':<10}{'threads':>8}{'busy':>11}{'waiting':>11}{'busy share':>12}  busy with",
    ]
    for name, stage in meters["stages"].items():
        doing = ", ".join(f"{what} {spent['seconds']:.2f} s" for what, spent in stage["activities"].items())
        share = 100 * _share(stage["busy_s"], stage["lifetime_s"])
        lines.append(
            f"  {name:<10}{stage['num_workers']:>8}{stage['busy_s']:>9.2f} s{stage['waiting_s']:>9.2f} s"
            f"{share:>10.1f} %  {doing}"
        )
    lines.append(f"  {'latency':<16}{'count':>8}{'p50':>12}{'p99':>12}{'p99.9':>12}{'largest':>12}")
    for name, found in meters["latencies"].items():
        values = "".join(f"{1000 * found[key]:>9.2f} ms" for key in (*_QUANTILES, "max_s"))
        lines.append(f"  {name:<16}{found['count']:>8}{values}")
    if meters["substituted"]:
        lines.append(f"  {meters['substituted']:,} samples were made from another record, see the warnings")
    for title in ("queues", "cache"):
        # Of a cache's many counters those that stand still say nothing.
        told = {name: value for name, value in meters[title].items() if value or title == "queues"}
        if told:
            lines.append(f"  {title}: " + ", ".join(f"{name} {value:,.0f}" for name, value in told.items()))
    return lines


def _counter(name: str, text: str, value: float) -> Family:
    return Family(name, "counter", text, [("", {}, value)])


def _labelled(name: str, kind: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> Family:
    return Family(name, kind, text, [("", {label: key}, value) for key, value in values])


def _summary(name: str, text: str, found: Mapping[str, float]) -> Family:
    quantiles = [("", {"quantile": share}, found[key]) for key, share in _QUANTILES.items()]
    totals: list[tuple[str, dict[str, str], float]] = [
        ("_sum", {}, found["sum_s"]),
        ("_count", {}, found["count"]),
    ]
    return Family(f"{name}_seconds", "summary", text, quantiles + totals)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _number(value: float) -> str:
    """Returns a float as Go's ParseFloat reads it."""
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return "NaN" if math.isnan(value) else repr(value)


def _escaped(text: str, *, quote: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quote else text
