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

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from records import make_record

from foldfeed.feature_store import CorruptDataError, FeatureStore, NotAStoreError, write_part
from foldfeed.feature_store.cli import main
from foldfeed.feature_store.markup import VOID, tag
from foldfeed.feature_store.report import ReportOptions, make_report

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
    assert "every entry of 1 jobs is in the store" in report()
    for damage, message in ((b"{", "not JSON"), (b"5", "no JSON object"), (b"\xff", "not JSON")):
        (job / "dead_letters.jsonl").write_bytes(b"{}\n" + damage + b"\n")
        with pytest.raises(CorruptDataError, match=rf"line 2: .*{message}"):
            report()


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
