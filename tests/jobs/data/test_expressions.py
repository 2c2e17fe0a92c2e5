"""Translating what a user asks into SQL; what the SQL finds is tested with the program, in test_query.py."""

import duckdb
import pytest

from jobs.data.expressions import known_column, translate
from jobs.data.schema import TABLE_SCHEMA
from mgmtn.attributes import ATTRIBUTES
from mgmtn.errors import ConfigError

COLUMNS = TABLE_SCHEMA.names


def value(expression: str, *, face_index: int = 0, labels: int = 0, young: float = 0.0) -> object:
    """What an expression is for one row, in DuckDB itself."""
    condition = translate(expression, columns=COLUMNS)
    row = "SELECT $face_index AS face_index, $labels::UBIGINT AS labels, $young::FLOAT AS young, 0.5::FLOAT AS smiling"
    values = {"face_index": face_index, "labels": labels, "young": young}
    [found] = duckdb.connect().execute(f"SELECT {condition.sql} FROM ({row})", values).fetchone()
    return found


@pytest.mark.parametrize("attribute", [ATTRIBUTES[0], "smiling", ATTRIBUTES[-1]])
def test_a_bare_attribute_is_its_own_bit_of_the_labels(attribute):
    bit = 1 << ATTRIBUTES.index(attribute)
    everything = (1 << 40) - 1
    assert value(attribute, labels=bit) is True
    assert value(attribute, labels=everything - bit) is False
    assert value(f"not {attribute}", labels=everything - bit) is True


@pytest.mark.parametrize("expression", ["young", "not young", "not (young or smiling)", "young is null or not young"])
def test_a_row_without_a_face_is_neither_true_nor_false(expression):
    assert value(expression, face_index=-1, young=None) is not False
    if "null" not in expression:
        assert value(expression, face_index=-1, young=None) is None


@pytest.mark.parametrize(
    ("expression", "uses_label", "uses_probability"),
    [
        ("young", True, False),
        ("(young)", True, False),
        ("young and young > 0.8", True, True),
        ("young > 0.8", False, True),
        ("(young) > 0.8", False, True),
        ("young between 0.2 and 0.8", False, True),
        ("young in (0.1, 0.2)", False, True),
        ("young is null", False, True),
        ("young is true", True, False),
        ("false = (young)", True, False),
        ("greatest(young, 0.1) > 0.5", False, True),
        ("case when young then true end", True, False),
        ("case when true then young end > 0.5", False, True),
        ("case young when 0.5 then true end", False, True),
        ("if(young, 1, 0) = 1", True, False),
        ("faces.young", True, False),
        ("young::bool", True, False),
        ("cast(young as integer) = 1", False, True),
        ("young in (true, false)", True, False),
        ("young in (0.5, 1)", False, True),
        ("true in (young)", False, True),
    ],
)
def test_the_place_decides_between_label_and_probability(expression, uses_label, uses_probability):
    sql = translate(expression, columns=COLUMNS).sql
    assert (f"labels >> {ATTRIBUTES.index('young')}" in sql, '"young"' in sql) == (uses_label, uses_probability)


def test_the_named_columns_are_told_in_order_each_once():
    condition = translate("Smiling and status = 'ok' and not (young or smiling)", columns=COLUMNS)
    assert condition.columns == ("smiling", "status", "young")


def test_celebas_spelling_is_understood():
    for spelled in ('"5_o_Clock_Shadow"', "5_o_Clock_Shadow > 0.1", "not 5_O_CLOCK_SHADOW"):
        assert translate(spelled, columns=COLUMNS).columns == ("five_o_clock_shadow",)
    assert "'a 5_o_Clock_Shadow'" in translate("uri = 'a 5_o_Clock_Shadow'", columns=COLUMNS).sql
    assert known_column("Big Lips", columns=COLUMNS) == "big_lips"


@pytest.mark.parametrize(
    ("name", "found"),
    [("Path", "Path"), ("path", "Path"), ("Young", "Young"), ("young", "Young"), ("SMILING", "smiling")],
)
def test_a_column_is_found_in_any_case_its_own_included(name, found):
    assert known_column(name, columns=["Path", "Young", "smiling"]) == found
    with pytest.raises(ConfigError, match="did you mean Path"):
        known_column("Pth", columns=["Path", "Young", "smiling"])


@pytest.mark.parametrize("expression", ["", "  ", "\n"])
def test_an_empty_expression_holds_for_every_row(expression):
    assert value(expression) is True


def test_a_comment_does_not_reach_the_query():
    assert "--" not in translate("young -- and bald\n and smiling", columns=COLUMNS).sql


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("smilng", "there is no column 'smilng'; did you mean smiling?"),
        ('status = "ok"', "there is no column 'ok'; text takes single quotes"),
        ("other.young", "there is no column 'other.young'"),
        ("smiling and", "cannot be read at character 11: something is missing"),
        ("smiling, young", "cannot be read at character 8"),
        ("1) or (1", "cannot be read at character 2"),
        ("'open", "cannot be read"),
        ("smiling young", "not a condition on a face"),
        ("(smiling, young)", "not a condition on a face"),
        ("smiling; drop table faces", "one expression is wanted, this is 2"),
        ("select 1", "not a condition on a face"),
        ("copy faces to 'x'", "not a condition on a face"),
        ("pragma version", "not a condition on a face"),
        ("load x", "not a condition on a face"),
        ("young > (select 1)", "no place in a condition"),
        ("exists(select 1)", "no place in a condition"),
        ("count(*) > 1", "no place in a condition"),
        ("row_number() over () = 1", "no place in a condition"),
        ("young > $1", "no place in a condition"),
        ("young > ?", "no place in a condition"),
    ],
)
def test_anything_but_one_condition_is_refused(expression, complaint):
    with pytest.raises(ConfigError, match="expression ") as refusal:
        translate(expression, columns=COLUMNS)
    assert complaint in str(refusal.value)
