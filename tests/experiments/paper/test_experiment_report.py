import json
import math

import pytest

from experiments.paper.figures import draw
from experiments.paper.report import Claim, Curve, Entry, Panel, Report, ReportTable, Row, brief, claim, report_mapping


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (Entry((57.34,)), "57.3"),
        (Entry((57.0, 58.0), paper=93.6), "57.5 ± 0.5 (93.6)"),
        (Entry((9.123,), "perplexity", 24.0), "9.12 (24.00)"),
        (Entry((0.0123,), "residual"), "1.2e-02"),
        (Entry((None,), paper="diverged"), "diverged (diverged)"),
        (Entry((None, 50.0)), "1 of 2 diverged"),
        (Entry((), paper=82.4), "- (82.4)"),
        (Entry((math.inf,)), "inf"),
    ],
)
def test_entry_shows_the_measured_number_and_the_papers(entry, text):
    assert str(entry) == text


def test_mean_is_missing_where_a_seed_diverged():
    assert Entry((1.0, 3.0)).mean == 2.0
    assert Entry((1.0, None)).mean is None
    assert Entry(()).mean is None
    assert math.isnan(Entry((1.0, None)).number)


def test_claim_without_a_number_is_not_measured():
    assert claim("a", "a holds", {"x": 1.0}, True).shown is True
    assert claim("a", "a holds", {"x": 1.0, "y": math.inf}, False).shown is False
    found = claim("a", "a holds", {"x": math.nan}, False)
    assert found.shown is None
    assert str(found) == "NOT MEASURED: a holds: x -"


def test_claim_says_its_numbers():
    assert str(Claim("a", "x beats y", {"x": 51.234, "y": 1234.5}, False)) == "NOT SHOWN: x beats y: x 51.2, y 1234.5"
    assert brief(0.00123456) == "0.00123"


def test_table_as_text_and_markdown():
    table = ReportTable("Accuracy", ("model", "%"), (Row("plain", (Entry((50.0,)),)), Row("b", (Entry((7.0,)),))))
    assert str(table).splitlines() == ["Accuracy", "model     %", "-----------", "plain  50.0", "b       7.0"]
    assert table.markdown() == "| model | % |\n|---|---|\n| plain | 50.0 |\n| b | 7.0 |"


def test_table_refuses_a_row_of_another_length():
    with pytest.raises(ValueError, match="row 'a' must have 1 entries, got 2"):
        ReportTable("t", ("model", "%"), (Row("a", (Entry(()), Entry(()))),))


def test_json_has_no_infinite_numbers():
    report = Report(
        [ReportTable("t", ("m", "x"), (Row("r", (Entry((math.inf,)),)),))], [claim("a", "s", {"n": math.inf}, False)]
    )
    mapping = report_mapping(report, {"experiment": "t"}, {})
    text = json.dumps(mapping, allow_nan=False)
    assert json.loads(text)["claims"] == [{"name": "a", "statement": "s", "measured": {"n": None}, "shown": False}]
    assert json.loads(text)["tables"][0]["rows"][0]["entries"][0]["values"] == [None]


def test_picture_leaves_out_what_is_not_there(tmp_path):
    pytest.importorskip("matplotlib")
    panels = [
        Panel("a", "x", "y", (Curve("one", [1.0, 2.0], [None, 3.0]), Curve("none", [1.0], [None])), log=True),
        Panel("b", "x", "y", (Curve("zero", [1.0], [0.0], "-", 7),), log=True),
        Panel("c", "x", "y", ()),
    ]
    draw(Report(panels=panels), "title", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
