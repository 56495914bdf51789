"""Records of CSV end where their quotes say, however long they are; a broken quote costs one line."""

from __future__ import annotations

import csv
import gzip
import io

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.separated import records

FIELD = st.text(st.sampled_from(['"', ",", "\n", "\r", "a", "é", "漢", " "]), max_size=12)
ROWS = st.lists(st.lists(FIELD, min_size=2, max_size=3), max_size=12)


def written(rows: list[list[str]]) -> list[bytes]:
    """Return each row as the csv module writes it."""
    found = []
    for row in rows:
        out = io.StringIO(newline="")
        csv.writer(out, quoting=csv.QUOTE_NONNUMERIC if len(row) == 3 else csv.QUOTE_MINIMAL).writerow(row)
        found.append(out.getvalue().encode())
    return found


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, limit=st.integers(5, 30))
def test_records_come_back_and_long_ones_are_passed_over_to_their_end(tmp_path, rows, limit):
    raw = written(rows)
    (tmp_path / "a.csv").write_bytes(b"".join(raw))
    found = list(records(str(tmp_path / "a.csv"), ",", limit))
    assert [record.problem for record in found] == [None if len(each) <= limit else ("oversized", "") for each in raw]
    for record, row, each in zip(found, rows, raw):
        assert (record.values, record.raw) == (row, each) if len(each) <= limit else each.startswith(record.raw[:5])
    assert [record.offset for record in found] == [sum(map(len, raw[:n])) for n in range(len(raw))]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=80) | st.text(st.sampled_from('",\na\r'), max_size=80).map(str.encode))
def test_any_bytes_are_divided_without_loss_of_a_line(tmp_path, data):
    """Whatever the quotes, every record begins where the one before ended, but for blank lines."""
    (tmp_path / "a.csv").write_bytes(data)
    at, passed_over = 0, False
    for record in records(str(tmp_path / "a.csv"), ",", 10):
        assert record.offset >= at
        if record.problem != ("oversized", ""):  # a kept record, or the one line that is given up
            assert data[record.offset :].startswith(record.raw)
        assert not data[at : record.offset].strip(b"\r\n") or passed_over
        passed_over = record.problem is not None
        at = record.offset + len(record.raw)


def test_quote_that_is_never_closed_costs_one_line(tmp_path):
    rest = [b"%d,text %d\r\n" % (n, n) for n in range(1000)]
    content = b'id,text\r\n0,"never closed\r\n' + b"".join(rest)
    (tmp_path / "a.csv").write_bytes(content)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(content))
    for name in ("a.csv", "a.csv.gz"):
        for limit in (100, 1 << 20):  # it is seen while the rest fits in memory, and long after
            found = list(records(str(tmp_path / name), ",", limit))
            bad = [record for record in found if record.problem]
            assert [(record.line, record.offset, record.problem[0]) for record in bad] == [(2, 9, "csv")]
            assert [record.values[1] for record in found[2:]] == [f"text {n}" for n in range(1000)]
            assert [record.line for record in found] == list(range(1, 1003))
    assert "only this line is left out" in bad[0].problem[1] or "unexpected end of data" in bad[0].problem[1]


def test_quote_in_a_later_line_does_not_close_an_open_one(tmp_path):
    content = b'id,text\n0,"open ' + b"x" * 50 + b'\n1,"quoted"\n2,plain\n'
    (tmp_path / "a.csv").write_bytes(content)
    found = list(records(str(tmp_path / "a.csv"), ",", 30))
    assert [record.values for record in found if not record.problem] == [
        ["id", "text"],
        ["1", "quoted"],
        ["2", "plain"],
    ]
    assert [record.problem[0] for record in found if record.problem] == ["csv"]
