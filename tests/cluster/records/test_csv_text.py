"""CSV that a spreadsheet may open: no cell is a formula, and every number is still one."""

import csv
import io

import pytest

from cluster.records.csv_text import as_csv


@pytest.mark.parametrize(
    "cell",
    [
        "=HYPERLINK(1)",
        "=1+1",
        "+cmd|' /C calc'!A0",
        "-1+cmd",
        "-x",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n=1",
        " =1",
        "--1",
    ],
)
def test_a_formula_is_text(cell):
    ((found, number),) = csv.reader(io.StringIO(as_csv([[cell, -1]]), newline=""))
    assert found == "'" + cell.replace("\r", " ")
    assert number == "-1"


@pytest.mark.parametrize(
    "cell",
    [-1.5, -3, 1e-7, "-0.5", "+3", "-1e-05", "-inf", "-", "-0.7 ± 8.9", "+22.7 ± 6.1", "topk 95 %", "a=b"],
)
def test_a_number_stays_a_number(cell):
    assert as_csv([[cell]]) == f"{cell}\n"


def test_what_is_not_there_is_empty():
    assert as_csv([[None, float("nan"), 0, "a,b"]]) == ',,0,"a,b"\n'
