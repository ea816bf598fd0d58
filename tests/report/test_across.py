"""The comparison of models in words and as a table: each number with its record, gaps left empty."""

import re

import pytest

from sdnb.observations import across_models
from sdnb.records.declared_across import KEY_FIGURES
from sdnb.report import across_table, findings
from sdnb.report.across import COLUMNS
from tests import shelf


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    return across_models(shelf.full_shelf(tmp_path_factory.mktemp("results"))).values


def cell(table: str, model: str, head: str) -> str:
    """The cell of a model under a head, as HTML."""
    lines = re.findall(r"<tr>.*</tr>", table)
    names = [re.sub("<.*?>", "", name) for name in re.findall(r"<th.*?</th>", lines[1])]
    [line] = [line for line in lines[2:] if f">{model}</th>" in line]
    return re.findall(r"<t[hd].*?</t[hd]>", line)[names.index(head)]


def test_every_column_has_a_head():
    assert set(COLUMNS) == {field.key for fields in KEY_FIGURES.values() for field in fields}


def test_a_cell_says_its_number_and_its_record(values):
    table = across_table(values).text
    title = 'title="org__one/04_singular_directions.json"'
    assert cell(table, "org/one", "angle of F (°)") == f'<td data-value="10" {title}>10</td>'
    assert ">33.3<" in cell(table, "org/one", "share outside (%)")
    assert cell(table, "org/two", "eigenvalue, decay") == "<td></td>", "not run"
    assert ">–<" in cell(table, "org/plain", "spread (°)"), "run, and there is none"
    assert ">none<" in cell(table, "org/plain", "explosion layers")
    assert "org__two: 01 02 04" in cell(table, "org/two", "records")
    assert "01, 02: another text" in cell(table, "org/plain", "note")


def test_notebooks_that_no_model_has_are_left_out(values):
    table = across_table(values).text
    assert re.findall(r'scope="colgroup">(\d\d)<', table) == ["01", "02", "04", "05", "14"]


def test_names_cannot_break_the_table(values):
    row = values["rows"][0] | {"model": "<b>&", "note": "a < b"}
    table = across_table(values | {"rows": [row]}).text
    assert "<b>" not in table and "&lt;b&gt;&amp;" in table and "a &lt; b" in table


def test_words_tell_spans_relatives_and_what_does_not_compare(values):
    said = findings("19_across_models", values, "all models").text
    assert "3 models with 10 records" in said and "in 2 of the 3 on which notebook 01 was run" in said
    assert "Nearer than chance brings them: `org/one`, `org/two`." in said
    assert "`org/plain` does not compare in 01, 02: another text." in said
    assert "| largest norm over its layer's median | 1.5 to 40 (3 models) |  |" in said
    assert "| F to the direction, there | 10° (2 models) |" in said and "LLaMA2-7B 6.05°" in said
    assert "versions of the package" not in said
    assert (
        "2 versions of the package"
        in findings("19_across_models", values | {"source_versions": 2}, "all models").text
    )
