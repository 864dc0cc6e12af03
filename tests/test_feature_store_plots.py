"""Statistics behind the pictures, and the pictures: decodable, repeatable, and of the right numbers."""

import io
import math
import threading
import xml.etree.ElementTree as ET
from fractions import Fraction

import matplotlib
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from records import make_record

from foldfeed.feature_store import FeatureStore, write_part
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.format import alphabet, effective_rows
from foldfeed.feature_store.format.sidecars import token_counts
from foldfeed.feature_store.looking import logo, measures, plots


@pytest.fixture
def run():
    def call(*args: object):
        return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)

    return call


def family(rng, depth: int, length: int) -> np.ndarray:
    """Rows that resemble each other to all degrees, with ragged ends."""
    founders = rng.integers(0, 22, (4, length))
    msa = founders[rng.integers(0, 4, depth)]
    msa = np.where(
        rng.random((depth, length)) < rng.random((depth, 1)) * 0.6, rng.integers(0, 22, msa.shape), msa
    )
    for row in range(0, depth, 3):
        msa[row, : rng.integers(0, length + 1)] = alphabet.GAP
    return msa.astype(np.uint8)


def weights_pair_by_pair(msa: np.ndarray, identity: float) -> list[float]:
    limit = Fraction(str(identity))
    residue = msa != alphabet.GAP
    found = []
    for row in range(len(msa)):
        matches = ((msa == msa[row]) & residue & residue[row]).sum(axis=1)
        columns = (residue | residue[row]).sum(axis=1)
        found.append(1 / sum(m >= limit * c for m, c in zip(matches.tolist(), columns.tolist(), strict=True)))
    return found


@pytest.mark.parametrize(
    ("depth", "length", "identity"),
    [(1, 1, 0.8), (300, 70, 0.62), (600, 130, 0.8), (257, 64, 0.5), (40, 200, 1.0), (530, 65, 0.05)],
)
def test_weights_are_those_of_comparing_every_pair(depth, length, identity):
    msa = family(np.random.default_rng((depth, length)), depth, length)
    assert effective_rows.row_weights(msa, identity).tolist() == weights_pair_by_pair(msa, identity)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_weights_for_any_block_size(data):
    depth, length = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 140))
    msa = family(np.random.default_rng(data.draw(st.integers(0, 2**32))), depth, length)
    identity = data.draw(st.sampled_from([0.01, 0.3, 0.5, 0.62, 0.8, 0.9, 1.0]))
    before, effective_rows.BLOCK_ROWS = effective_rows.BLOCK_ROWS, data.draw(st.integers(1, 30))
    try:
        assert effective_rows.row_weights(msa, identity).tolist() == weights_pair_by_pair(msa, identity)
    finally:
        effective_rows.BLOCK_ROWS = before


def test_the_order_of_rows_does_not_matter():
    rng = np.random.default_rng(3)
    msa = family(rng, 200, 90)
    order = rng.permutation(200)
    weights = effective_rows.row_weights(msa)
    np.testing.assert_array_equal(effective_rows.row_weights(msa[order]), weights[order])
    assert effective_rows.effective_rows(msa[order]) == effective_rows.effective_rows(msa)


def test_effective_rows_of_alignments_one_can_count():
    row = np.arange(10, dtype=np.uint8)
    assert effective_rows.effective_rows(np.tile(row, (50, 1))) == 1.0
    eight = row.copy()
    eight[:2] = 15
    assert effective_rows.effective_rows(np.stack([row, eight])) == 1.0  # 8 of 10 columns: 80 %
    seven = row.copy()
    seven[:3] = 15
    assert effective_rows.effective_rows(np.stack([row, seven])) == 2.0
    half = row.copy()
    half[5:] = alphabet.GAP
    # Five matches of ten columns in which either row has a residue.
    assert effective_rows.effective_rows(np.stack([row, half])) == 2.0
    assert effective_rows.effective_rows(np.stack([row, half]), 0.5) == 1.0
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        effective_rows.effective_rows(row[None], 0)


def test_bits_are_counted_without_numpy_2(monkeypatch):
    words = np.random.default_rng(1).integers(0, 2**64, (7, 9), dtype=np.uint64)
    want = [[bin(word).count("1") for word in row] for row in words.tolist()]
    assert effective_rows._count_bits(words).tolist() == want
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert effective_rows._count_bits(words).tolist() == want


def test_information_of_columns_one_can_compute():
    counts = np.zeros((5, 22), np.int64)
    counts[0, 3] = 1000  # one residue throughout
    counts[1, :20] = 100  # all residues alike
    counts[2, [4, 5]] = 500
    counts[3, 7] = 5
    counts[3, 21] = 95  # gaps are no sample
    counts[4, 20] = 10  # X alone
    facts = measures.information(counts)
    correction = 19 / (2 * math.log(2))
    want = [math.log2(20) - correction / 1000, 0, math.log2(20) - 1 - correction / 1000, 0, 0]
    want[3] = math.log2(20) - correction / 5
    np.testing.assert_allclose(facts.bits, want, atol=1e-12)
    np.testing.assert_allclose(facts.occupancy, [1, 1, 1, 0.05, 0])
    np.testing.assert_allclose(facts.share.sum(axis=1), [1, 1, 1, 1, 0])


def test_counts_of_a_window_are_those_of_the_whole(small_store, monkeypatch):
    monkeypatch.setattr(measures, "READ_ROWS", 100)
    record = small_store["b2"]
    np.testing.assert_array_equal(measures.read_msa(record), record.msa())
    want = token_counts(record.msa()[:, 20:90])
    np.testing.assert_array_equal(measures.window_counts(record, slice(20, 90)), want)


def test_neff_of_a_store(small_store):
    table = measures.store_effective_rows(small_store)
    assert table["record_id"].to_pylist() == small_store.ids
    want = [effective_rows.effective_rows(small_store[name].msa()) for name in small_store.ids]
    assert table["neff"].to_pylist() == want
    assert measures.store_effective_rows(small_store, max_records=2)["record_id"].to_pylist() == ["a1", "b2"]
    assert measures.sample_positions(10, 3) == [0, 3, 6]
    assert measures.sample_positions(3, None) == measures.sample_positions(3, 9) == [0, 1, 2]


def test_letters_fill_their_boxes():
    for letter, outline in logo.LETTERS.items():
        box = outline.get_extents()
        sides = (1 / 3, 2 / 3) if letter == "I" else (0, 1)
        np.testing.assert_allclose([box.x0, box.x1, box.y0, box.y1], [*sides, 0, 1], atol=1e-9)


def test_a_stack_is_as_high_as_its_information():
    counts = np.zeros((1, 22), np.int64)
    counts[0, [0, 5, 10]] = [60, 30, 10]
    counts[0, 21] = 100
    facts = measures.information(counts)
    boxes = [
        outline.get_extents()
        for letters in logo.COLOURS
        for outline in logo._stack(facts, 0, letters, math.log2(20))
    ]
    boxes.sort(key=lambda box: box.y0)
    np.testing.assert_allclose([box.height / facts.bits[0] for box in boxes], [0.1, 0.3, 0.6])
    assert boxes[-1].y1 == pytest.approx(facts.bits[0])
    assert boxes[0].width == pytest.approx(0.5 * (1 - logo.GAP))
    assert sorted("".join(logo.COLOURS)) == sorted(alphabet.RESIDUES)


def figures(store) -> dict:
    table = store.table(["length", "depth"])
    return {
        "coverage": plots.coverage_figure(store["b2"]),
        "lengths": plots.lengths_figure(table, "a $tore\u4f60"),
        "depths": plots.depths_figure(table, "x" * 300),
        "neff": plots.neff_figure(measures.store_effective_rows(store), "s", 9, 0.8),
        "logo": logo.logo_figure(store["b2"], slice(0, 130)),
    }


def test_pictures_decode_and_are_the_same_bytes_every_time(small_store):
    salt = matplotlib.rcParams["svg.hashsalt"]
    first = {
        (name, form): plots.render(figure, form)
        for name, figure in figures(small_store).items()
        for form in plots.CANVASES
    }
    again = {
        (name, form): plots.render(figure, form)
        for name, figure in figures(small_store).items()
        for form in plots.CANVASES
    }
    assert first == again
    assert matplotlib.rcParams["svg.hashsalt"] == salt
    for (name, form), data in first.items():
        if form == ".png":
            pixels = imread(io.BytesIO(data))
            assert pixels.shape[0] > 300, name
            assert pixels[..., :3].std() > 0.02, name
        else:
            assert ET.fromstring(data).tag == "{http://www.w3.org/2000/svg}svg"


def test_the_coverage_picture_draws_what_it_was_given(small_store):
    axes = plots.coverage_figure(small_store["b2"]).axes[0]
    image = plots.coverage_image(small_store["b2"].msa())
    np.testing.assert_array_equal(axes.images[0].get_array(), image.identity)
    np.testing.assert_array_equal(axes.patches[0].get_data().values, image.coverage)


def test_histograms_count_every_record(tmp_path):
    store = FeatureStore.create(tmp_path / "s")
    records = [
        make_record(f"r{n:02d}", depth, 5 + n % 7)
        for n, depth in enumerate([1, 1, 2, 9, 10, 11, 99, 100, 1000])
    ]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="j")
    table = store.table(["length", "depth"])
    for figure in (plots.lengths_figure(table, "s"), plots.depths_figure(table, "s")):
        bars = figure.axes[0].patches
        assert sum(bar.get_height() for bar in bars) == 9
    one = store.view("depth = 1000").table(["length", "depth"])
    for figure in (plots.lengths_figure(one, "s"), plots.depths_figure(one, "s")):
        assert plots.render(figure, ".svg")
    empty = store.view("false").table(["length", "depth"])
    for figure in (plots.lengths_figure(empty, "s"), plots.depths_figure(empty, "s")):
        assert plots.render(figure, ".png")


def test_threads_draw_at_once(small_store):
    found: list[bytes] = []
    table = small_store.table(["length"])

    def draw():
        found.append(plots.render(plots.lengths_figure(table, "s"), ".svg"))

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    "args",
    [
        ["b2"],
        ["b2", "--kind", "logo", "--residues", "10:60"],
        ["a1", "--kind", "logo"],
        ["--kind", "lengths"],
        ["--kind", "depths"],
        ["--kind", "neff", "--identity", "0.62", "--max-records", "2"],
    ],
)
def test_plot_writes_every_kind(run, small_store, tmp_path, args):
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        path = tmp_path / f"x{suffix}"
        result = run("plot", small_store.url, *args, "--output", path)
        assert result.exit_code == 0, result.output
        assert path.read_bytes().startswith(magic)


def test_plot_names_its_files(run, small_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("plot", small_store.url, "b2").stdout == "b2.png\n"
    assert run("plot", small_store.url, "b2", "--kind", "logo").stdout == "b2-logo.png\n"
    assert run("plot", small_store.url + "/", "--kind", "depths").stdout == "store-depths.png\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--kind", "coverage"], "shows one record"),
        (["b2", "--kind", "neff"], "leave 'b2' out"),
        (["b2", "--residues", "1:2"], "--residues has no effect with --kind coverage"),
        (["--kind", "depths", "--identity", "0.5"], "--identity has no effect"),
        (["--kind", "lengths", "--max-records", "5"], "--max-records has no effect"),
        (["--kind", "neff", "--identity", "0"], "0<x<=1"),
        (["b2", "--kind", "logo", "--residues", "200:500"], "200:500 is an empty window of 0:130"),
        (["b2", "--kind", "pie"], "'pie' is not one of"),
        (["b2", "--output", "x.gif"], "must end in .png or .svg"),
    ],
)
def test_plot_refuses_what_makes_no_sense(run, small_store, args, message):
    result = run("plot", small_store.url, *args)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_logo_of_a_long_protein_asks_for_a_window(run, tmp_path):
    store = FeatureStore.create(tmp_path / "long")
    store.commit([write_part(store.url, [make_record("r", 2, 501)], store.settings).part_id], job_id="j")
    result = run("plot", store.url, "r", "--kind", "logo")
    assert result.exit_code == 2
    assert "'r' has 501 residues; choose a window a:b of at most" in result.stderr
    with pytest.raises(ValueError, match="cannot be read"):
        logo.logo_figure(store["r"], slice(0, 501))
