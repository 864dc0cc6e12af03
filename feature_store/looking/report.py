"""One page about a store: numbers, pictures, data card; self-contained HTML without scripts.

Owns what the page says and in which order. Does not own the numbers (`measures`), the pictures (`plots`,
`logo`) or the escaping (`markup`). The page loads nothing: pictures are data URIs, and its content security
policy forbids everything else. The same store gives the same bytes.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from foldfeed.feature_store.format.effective_rows import DEFAULT_IDENTITY
from foldfeed.feature_store.looking import logo, measures, plots
from foldfeed.feature_store.looking.data_card import data_card, sizes_section
from foldfeed.feature_store.looking.dead_letters import letters_of_file, letters_of_results
from foldfeed.feature_store.looking.markup import Child, Html, raw, tag
from foldfeed.feature_store.looking.style import STYLE
from foldfeed.feature_store.looking.tables import data_table, more
from foldfeed.feature_store.store.feature_store import FeatureStore, Record
from foldfeed.feature_store.store.questions import RecordSource

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MAX_RECORDS_LISTED = 200
MAX_LOG_LISTED = 50
LOGO_COLUMNS = 100


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReportOptions:
    """What a report costs and shows.

    Attributes:
      title: of the page; the store's folder when None.
      results: folder of a build's results, whose dead letters are listed; none when None.
      dead_letters: one file of dead letters instead; none when None.
      neff_records: at most so many records have their N_eff computed (all pairs of rows); 0 for no such
        picture.
      identity: of N_eff.
      examples: records shown with coverage and logo.
    """

    title: str | None = None
    results: str | None = None
    dead_letters: str | None = None
    neff_records: int = 200
    identity: float = DEFAULT_IDENTITY
    examples: int = 3

    def __post_init__(self) -> None:
        if self.results is not None and self.dead_letters is not None:
            raise ValueError(
                f"results {self.results!r} and dead_letters {self.dead_letters!r} both name dead letters; "
                "give one of them"
            )
        if self.neff_records < 0 or self.examples < 0:
            raise ValueError(
                f"neff_records {self.neff_records} and examples {self.examples} must not be negative"
            )


def make_report(
    store: FeatureStore,
    options: ReportOptions | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> str:
    """Returns the page.

    Args:
      store: a version of a store.
      options: defaults when None.
      on_step: told what is done next.
    Raises:
      NotAStoreError: ``options.results`` is no folder of results.
      FileNotFoundError: there is no file ``options.dead_letters``.
      CorruptDataError: a file of dead letters is damaged.
    """
    options = options or ReportOptions()
    name = options.title or store.url.rstrip("/").rsplit("/", 1)[-1]
    # First, because it can fail: nobody waits for pictures of a page that will not be.
    letters: Child = None
    if options.results is not None:
        letters = letters_of_results(options.results)
    elif options.dead_letters is not None:
        letters = letters_of_file(options.dead_letters)
    sections: list[tuple[str, str, Child]] = [("numbers", "Numbers", _numbers(store))]
    if len(store):
        on_step("drawing")
        sections.append(("distributions", "Lengths, depths, N_eff", _distributions(store, name, options)))
        sections.append(("examples", "Examples", _examples(store, options.examples)))
    on_step("collecting")
    sections += [("data", "Data card", data_card(store)), ("names", "Sets and splits", _names(store))]
    sections += [("sizes", "Size on disk", sizes_section(store)), ("jobs", "Jobs", _jobs(store))]
    if letters is not None:
        sections.append(("dead-letters", "Dead letters", letters))
    sections.append(("records", "Records", _records(store)))
    return _page(name, store, sections)


def _page(name: str, store: FeatureStore, sections: list[tuple[str, str, Child]]) -> str:
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{name}: feature store, version {store.version}"),
        tag("style", raw(STYLE)),
    )
    top = tag(
        "header",
        tag("h1", name),
        tag("p", f"Feature store at {store.url}, version {store.version}.", class_="where"),
        tag("nav", [tag("a", title, href=f"#{anchor}") for anchor, title, _ in sections]),
    )
    body = [tag("section", tag("h2", title), content, id=anchor) for anchor, title, content in sections]
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", top, tag("main", body)), lang="en") + "\n"


def _numbers(store: FeatureStore) -> Child:
    table = store.table(["length", "depth", "gap_fraction", "part_id"])
    lengths, depths = (table[name].to_numpy().astype(np.int64) for name in ("length", "depth"))
    tokens = int((lengths * depths).sum())
    gaps = float((table["gap_fraction"].to_numpy() * lengths * depths).sum()) / tokens if tokens else 0.0
    tiles = [
        ("records", f"{len(store):,}"),
        ("residues", f"{int(lengths.sum()):,}"),
        ("rows", f"{int(depths.sum()):,}"),
        ("tokens", f"{tokens:,}"),
        ("gaps", f"{gaps:.0%}"),
        ("parts", f"{len(table['part_id'].unique()):,}"),
    ]
    rows = [
        [what, *(f"{value:,.0f}" for value in np.percentile(values, (0, 5, 25, 50, 75, 95, 100)))]
        for what, values in (("length (residues)", lengths), ("depth (rows)", depths))
        if len(values)
    ]
    heads = ["", "least", "5 %", "25 %", "median", "75 %", "95 %", "most"]
    return [
        tag("dl", [tag("div", tag("dt", what), tag("dd", value)) for what, value in tiles], class_="tiles"),
        data_table(heads, rows, numeric=range(1, 8)) if rows else None,
        tag("p", "Fingerprint ", tag("code", store.fingerprint)),
        tag("p", f"Tiles of {store.settings.tile_rows} rows x {store.settings.tile_cols} residues."),
    ]


def _distributions(store: FeatureStore, name: str, options: ReportOptions) -> Child:
    table = store.table(["length", "depth"])
    shown = [
        _picture(plots.lengths_figure(table, name), ".svg", "Histogram of the lengths of all records"),
        _picture(plots.depths_figure(table, name), ".svg", "Histogram of the depths of all alignments"),
    ]
    if options.neff_records:
        effective = measures.store_effective_rows(
            store, identity=options.identity, max_records=options.neff_records
        )
        figure = plots.neff_figure(effective, name, len(store), options.identity)
        words = (
            f"N_eff adds up 1 / (number of rows at least {options.identity:.0%} identical) over all rows; "
            "identity is measured where either row has a residue."
        )
        shown.append(_picture(figure, ".svg", "N_eff against length", caption=words))
    return tag("div", shown, class_="pictures")


def _examples(store: FeatureStore, wanted: int) -> Child:
    """Shows records from the deepest to the shallowest alignment, evenly spaced."""
    ids = store.query("select record_id from records order by depth desc, record_id")["record_id"].to_pylist()
    last = len(ids) - 1
    places = sorted({round(number * last / max(1, wanted - 1)) for number in range(wanted)})
    return [_example(store[ids[place]]) for place in places if place <= last]


def _example(record: Record) -> Html:
    window = _busiest_window(record)
    whole = window == slice(0, record.length)
    words = "" if whole else f"The {LOGO_COLUMNS} neighbouring residues with the most information."
    return tag(
        "article",
        tag("h3", record.record_id),
        tag("p", record.description) if record.description else None,
        _picture(plots.coverage_figure(record), ".png", f"Coverage of {record.record_id}"),
        _picture(
            logo.logo_figure(record, window),
            ".svg",
            f"Sequence logo of {record.record_id}",
            words,
        ),
    )


def _busiest_window(record: Record) -> slice:
    if record.length <= LOGO_COLUMNS:
        return slice(0, record.length)
    facts = measures.information(measures.window_counts(record, slice(0, record.length)))
    sums = np.concatenate([[0.0], np.cumsum(facts.bits * facts.occupancy)])
    start = int(np.argmax(sums[LOGO_COLUMNS:] - sums[:-LOGO_COLUMNS]))
    return slice(start, start + LOGO_COLUMNS)


def _names(store: RecordSource[Record]) -> Child:
    sets = [store.set(name) for name in store.set_names()]
    cuts = [store.split(name) for name in store.split_names()]
    set_rows: list[list[Child]] = [
        [
            found.name,
            f"{len(found):,}",
            found.store_version,
            f"{found.within.split}: {found.within.part}" if found.within else "",
            tag("code", found.fingerprint[:16], title=found.fingerprint),
            tag("code", found.sql, class_="sql"),
        ]
        for found in sets
    ]
    split_rows: list[list[Child]] = [
        [cut.name, cut.seed, cut.source, part, f"{share:.3g}", f"{len(cut.ids(part)):,}"]
        for cut in cuts
        for part, share in cut.fractions.items()
    ]
    heads = ["set", "records", "from version", "within", "fingerprint", "question"]
    return [
        data_table(heads, set_rows, numeric=(1, 2)) if sets else tag("p", "No record set is saved."),
        data_table(["split", "seed", "clusters", "part", "share", "records"], split_rows, numeric=(1, 4, 5))
        if cuts
        else tag("p", "No split is saved."),
    ]


def _jobs(store: FeatureStore) -> Child:
    entries = store.log()
    rows: list[Sequence[Child]] = [
        [
            entry.version,
            entry.time.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S"),
            entry.operation,
            f"{entry.num_added:,}",
            entry.job_id,
            entry.message,
        ]
        for entry in entries[:MAX_LOG_LISTED]
    ]
    heads = ["version", "time (UTC)", "operation", "records", "job", "message"]
    return [
        more(len(rows), len(entries), "version", ", the newest first"),
        data_table(heads, rows, numeric=(0, 3)),
    ]


def _records(store: RecordSource[Record]) -> Child:
    columns = ["record_id", "description", "length", "depth", "gap_fraction"]
    table = store.table(columns)
    listed = table.sort_by([("depth", "descending"), ("record_id", "ascending")]).slice(0, MAX_RECORDS_LISTED)
    rows: list[Sequence[Child]] = [
        [
            tag("code", row["record_id"]),
            row["description"],
            f"{row['length']:,}",
            f"{row['depth']:,}",
            f"{row['gap_fraction']:.0%}",
        ]
        for row in listed.to_pylist()
    ]
    heads = ["record", "description", "length", "depth", "gaps"]
    return [
        more(len(rows), len(table), "record", ", the deepest first"),
        data_table(heads, rows, numeric=(2, 3, 4)),
    ]


def _picture(figure: Figure, suffix: str, alt: str, caption: str = "") -> Html:
    kind = {".svg": "image/svg+xml", ".png": "image/png"}[suffix]
    data = base64.b64encode(plots.render(figure, suffix)).decode()
    wide, high = figure.get_size_inches() * 96
    image = tag("img", src=f"data:{kind};base64,{data}", alt=alt, width=round(wide), height=round(high))
    return tag("figure", image, tag("figcaption", caption) if caption else None)
