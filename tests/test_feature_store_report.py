"""The report of a store: one page that loads nothing, escapes everything, and says what is so."""

import base64
import binascii
import dataclasses
import html.parser
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from records import make_record

from foldfeed.feature_store import CorruptDataError, FeatureStore, NotAStoreError, write_part
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.looking import data_card as report_data
from foldfeed.feature_store.looking.data_card import array_sizes
from foldfeed.feature_store.looking.markup import VOID, tag
from foldfeed.feature_store.looking.report import ReportOptions, make_report

EVIL = "<script>alert('x')</script>&\"' \x00 onload=1 </td></table> ü\u202e"


class Page(html.parser.HTMLParser):
    """Reads a page and keeps what matters; fails on elements that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def evil_store(folder):
    """A store whose every free text is an attack, with a set, a split and dead letters."""
    store = FeatureStore.create(folder / "st<o>re & 'co'")
    records = [
        dataclasses.replace(
            make_record(f"r{n}", depth, length, n),
            description=EVIL,
            extra={"licence": EVIL, "release_date": f"200{n}-01-01", "family": f"f{n}"},
        )
        for n, (depth, length) in enumerate([(1, 9), (40, 130), (7, 65)])
    ]
    bad = tuple(dataclasses.replace(use, name=EVIL, tool_version=EVIL) for use in records[1].databases)
    records[1] = dataclasses.replace(records[1], databases=bad)
    part = write_part(store.url, records, store.settings)
    store.commit([part.part_id], job_id=EVIL.replace("\x00", ""), message=EVIL.replace("\x00", ""))
    store.save_split("cut", "extra.family", fractions={"train": 0.5, "test": 0.5}, seed=1, source=EVIL)
    store.save_set("deep", "from records where depth > 5 -- " + EVIL.replace("\x00", ""))
    job = folder / "results" / "jobs" / "job-1"
    job.mkdir(parents=True)
    letter = {"record_id": EVIL, "stage": "read", "reason": EVIL, "source": "q.fasta", "line": 3, "extra": 1}
    (job / "dead_letters.jsonl").write_text(json.dumps(letter) + "\n")
    (folder / "results" / "jobs" / "job-2").mkdir()
    return store


@pytest.fixture(scope="module")
def page(evil_store, folder) -> str:
    return make_report(evil_store, ReportOptions(results=str(folder / "results"), title=EVIL))


def test_the_page_loads_nothing_and_runs_nothing(page):
    parsed = Page(page)
    names = {name for name, _ in parsed.elements}
    assert not names & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "svg",
        "audio",
        "video",
    }
    for name, attributes in parsed.elements:
        assert not any(key.startswith("on") for key in attributes), (name, attributes)
        for key in ("src", "href", "srcset", "action", "data", "poster", "style", "background"):
            value = attributes.get(key) or ""
            assert value == "" or value.startswith(("#", "data:image/")), (name, key, value[:80])
    policy = next(
        a["content"] for n, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")
    style = re.search(r"<style>(.*?)</style>", page, re.S)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_all_pictures_decode_and_have_words(page):
    pictures = [attributes for name, attributes in Page(page).elements if name == "img"]
    kinds = []
    for picture in pictures:
        assert picture["alt"]
        kind, _, data = (picture["src"] or "").removeprefix("data:").partition(";base64,")
        kinds.append(kind)
        content = base64.b64decode(data, validate=True)
        if kind == "image/png":
            assert imread(io.BytesIO(content)).shape[0] > 100
        else:
            root = ET.fromstring(content)
            assert root.tag.endswith("}svg")
            links = [
                value for node in root.iter() for key, value in node.attrib.items() if key.endswith("href")
            ]
            assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert kinds.count("image/png") == 3
    assert kinds.count("image/svg+xml") == 6


def test_texts_arrive_as_they_are(page):
    shown = EVIL.replace("\x00", "\ufffd")
    text = Page(page).text
    # Title, three descriptions twice, licence, database name and version, job and message, ...
    assert text.count(shown) >= 12
    assert "<script" not in page
    assert "\x00" not in page


def test_the_page_says_what_is_so(evil_store, page):
    text = re.sub(r"\s*\n\s*", "|", Page(page).text)
    for words in (
        "|records|3|",
        "|residues|204|",
        "|rows|48|",
        f"|{evil_store.fingerprint}|",
        "|2000-01-01 to 2002-01-01 (3 records; 0 have none).|",
        "|deep|2|1|",
        "|1 dead letter.|",
        "|r1|",
        "|uniref90|",
    ):
        assert words in text, words


def test_the_same_store_gives_the_same_page(evil_store, folder, page):
    again = FeatureStore.open(evil_store.url)
    assert make_report(again, ReportOptions(results=str(folder / "results"), title=EVIL)) == page


def test_an_empty_store_has_a_report(tmp_path):
    store = FeatureStore.create(tmp_path / "empty")
    parsed = Page(make_report(store))
    assert "No database was searched." in parsed.text
    assert not [name for name, _ in parsed.elements if name == "img"]


def test_parts_of_the_report_can_be_left_out(evil_store):
    parsed = Page(make_report(evil_store, ReportOptions(neff_records=0, examples=0)))
    assert len([name for name, _ in parsed.elements if name == "img"]) == 2
    assert "dead letter" not in parsed.text
    with pytest.raises(ValueError, match="must not be negative"):
        ReportOptions(examples=-1)


def test_results_that_are_none_and_damaged_letters_are_errors(evil_store, tmp_path):
    def report():
        return make_report(evil_store, ReportOptions(results=str(tmp_path), neff_records=0, examples=0))

    with pytest.raises(NotAStoreError, match="no folder of results"):
        report()
    job = tmp_path / "jobs" / "job-1"
    job.mkdir(parents=True)
    assert "every entry of 1 job is in the store" in report()
    for damage, message in ((b"{", "not JSON"), (b"5", "no JSON object"), (b"\xff", "not JSON")):
        (job / "dead_letters.jsonl").write_bytes(b"{}\n" + damage + b"\n")
        with pytest.raises(CorruptDataError, match=rf"line 2: .*{message}"):
            report()


def flat(page: str) -> str:
    return re.sub(r"\s*\n\s*", "|", Page(page).text)


def test_one_file_of_dead_letters_is_enough(evil_store, tmp_path):
    def report():
        options = ReportOptions(dead_letters=str(path), neff_records=0, examples=0)
        return flat(make_report(evil_store, options))

    path = tmp_path / "letters.jsonl"
    with pytest.raises(FileNotFoundError):
        report()
    path.write_text("")
    assert "|None: the file is empty.|" in report()
    letters = [
        {"record_id": f"bad{n}", "stage": "search", "reason": "too long", "line": n} for n in range(250)
    ]
    path.write_text("".join(json.dumps(letter) + "\n" for letter in letters))
    shown = report()
    assert "|200 of 250 dead letters.|" in shown
    assert "|bad0|search|too long|0|" in shown
    path.write_text(path.read_text() + "[]\n")
    with pytest.raises(CorruptDataError, match=r"line 251: .*no JSON object"):
        report()
    with pytest.raises(ValueError, match="give one of them"):
        ReportOptions(dead_letters="a", results="b")


def test_licences_stand_by_database(tmp_path):
    store = FeatureStore.create(tmp_path / "s")
    facts = [
        {"licence": "CC BY 4.0", "licence.mgnify": "CC0"},
        {"licence": "ODbL"},
        {},
        {"license.uniref90": "A"},
    ]
    records = [
        dataclasses.replace(make_record(f"r{number}", 3, 5, number), extra=fact)
        for number, fact in enumerate(facts)
    ]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="j")
    options = ReportOptions(neff_records=0, examples=0)
    shown = flat(make_report(store, options))
    for words in (
        "|mgnify|CC0|1|mgnify|ODbL|1|mgnify|not given|2|",
        "|uniref90|A|1|uniref90|CC BY 4.0|1|uniref90|ODbL|1|uniref90|not given|1|",
        "|licence|CC BY 4.0|1|licence|ODbL|1|licence.mgnify|CC0|1|license.uniref90|A|1|",
        "|1 of 4 records have no licence.|",
    ):
        assert words in shown, words
    # A column that somebody annotated later counts as well.
    store.annotate(pa.table({"record_id": ["r2"], "licence": ["MIT"]}))
    shown = flat(make_report(store, options))
    assert "|mgnify|CC0|1|mgnify|MIT|1|mgnify|ODbL|1|mgnify|not given|1|" in shown
    assert "records have no licence" not in shown


def test_sizes_are_those_on_the_disk(tmp_path):
    store = FeatureStore.create(tmp_path / "s")
    ids = [
        write_part(store.url, [make_record(f"r{n}", 300, 40 + n)], store.settings).part_id for n in range(2)
    ]
    store.commit(ids, job_id="j")
    sizes = array_sizes(store)
    folders: dict[str, int] = {}
    for path in (tmp_path / "s" / "parts").glob("*/**/*"):
        if path.is_file():
            inside = path.relative_to(tmp_path / "s" / "parts").parts[1:]
            name = inside[0] if len(inside) > 1 else ""
            folders[name] = folders.get(name, 0) + path.stat().st_size
    assert {name: size.stored_bytes for name, size in sizes.items()} == folders
    # One tile of 512 x 64 for each record, whatever zstd makes of it.
    assert sizes["msa"].plain_bytes == sizes["deletion"].plain_bytes == 2 * 512 * 64
    assert sizes["aatype"].plain_bytes == 81
    assert sizes["row_e_value"].plain_bytes == 600 * 8
    shown = flat(make_report(store, ReportOptions(neff_records=0, examples=0)))
    ratio = sizes["msa"].plain_bytes / sizes["msa"].stored_bytes
    assert f"|65.5 kB|{ratio:.1f}|" in shown
    assert "|index, files of this version|" in shown


def test_report_from_the_command_line(small_store, tmp_path):
    def run(*args: object):
        words = [str(arg) for arg in ("report", small_store.url, "--neff-records", 0, *args)]
        return CliRunner().invoke(main, words, catch_exceptions=False)

    (tmp_path / "jobs").mkdir()
    path = tmp_path / "page.html"
    result = run("--output", path, "--title", "a < b")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{path}\n"
    assert "a < b" in Page(path.read_text()).text
    result = run("--output", path, "--results", tmp_path)
    assert result.exit_code == 1
    assert "no folder of results" in result.stderr
    (tmp_path / "letters").write_text('{"record_id": "lost"}\n')
    result = run("--output", path, "--dead-letters", tmp_path / "letters")
    assert result.exit_code == 0, result.output
    assert "|1 dead letter.|" in flat(path.read_text())
    assert run("--output", path, "--dead-letters", "x", "--results", "y").exit_code == 2
    result = run("--output", path, "--dead-letters", tmp_path / "none")
    assert result.exit_code == 1
    assert "none" in result.stderr


@given(st.text(), st.text())
def test_no_text_becomes_markup(text, attribute):
    made = tag("p", text, title=attribute)
    parsed = Page(made)
    assert [name for name, _ in parsed.elements] == ["p"]
    assert "<" not in made[made.index(">") + 1 : made.rindex("</p>")]


def test_tags_are_checked():
    assert tag("p", "a < b", None, 5, [tag("br"), "&"], class_="x") == '<p class="x">a &lt; b5<br>&amp;</p>'
    with pytest.raises(ValueError, match="no name of an element"):
        tag("p onload")


def test_a_real_browser_shows_the_page(page, tmp_path):
    """Chromium draws every picture of the page: it reports none as broken and paints all of its area."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium on PATH; apt-get install chromium")
    path, shot = tmp_path / "page.html", tmp_path / "shot.png"
    path.write_text(page)
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars --window-size=1200,3000"
    )
    command = [browser, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    if not shot.exists():
        pytest.fail(f"chromium took no picture (code {done.returncode}): {done.stderr[-2000:]}")
    pixels = imread(shot)[..., :3]
    assert pixels.shape[:2] == (3000, 1200)
    # Text and pictures down the whole page: no band of 500 pixels is blank.
    assert all(pixels[top : top + 500].std() > 0.02 for top in range(0, 3000, 500))
    assert "Refused to" not in done.stderr
    assert binascii.crc32(shot.read_bytes())


def test_the_case_of_a_licence_s_key_does_not_matter():
    """A fact that counts as a licence is found as one."""
    fact = {"Licence": "MIT", "License.MGnify": "CC0"}
    assert all(map(report_data._is_licence, fact))
    assert report_data._licence_of(fact, "mgnify") == report_data._licence_of(fact, "MGnify") == "CC0"
    assert report_data._licence_of(fact, "uniref90") == "MIT"
    assert report_data._licence_of({}, "uniref90") == report_data.NOT_GIVEN
    # Two that differ in nothing but case: the plain one is meant.
    assert report_data._licence_of({"LICENCE": "A", "licence": "B", "Licence": "C"}, "x") == "B"
