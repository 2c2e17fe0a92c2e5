"""What a user asks of the faces, `smiling and not eyeglasses and young > 0.8`, as a condition in DuckDB's SQL.

An attribute's name means two things. Where true or false is expected it is the label: the attribute's bit in `labels`,
set under the thresholds of the model. Anywhere else, as in a comparison, it is the probability. A row without a face
has no labels: `smiling` and `not smiling` are both unknown there, and neither finds it.
"""

import difflib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

from mgmtn.attributes import ATTRIBUTES, attribute_name
from mgmtn.errors import ConfigError

VIEW: Final = "faces"
EXAMPLE: Final = "smiling and not eyeglasses and young > 0.8"
_QUOTED: Final = re.compile(r"""('(?:[^']|'')*'|"(?:[^"]|"")*")""")
_NUMBERED: Final = re.compile(r"(?<!\w)5_o_clock_shadow(?!\w)", re.IGNORECASE)
_REFUSED: Final = (exp.Query, exp.Star, exp.Placeholder, exp.Parameter, exp.AggFunc, exp.Window, exp.Command)


@dataclass(frozen=True)
class Condition:
    """A condition over the view `faces`: its SQL, and the columns that it names, in order, each once."""

    sql: str
    columns: tuple[str, ...]


def translate(expression: str, *, columns: Sequence[str]) -> Condition:
    """Translate one expression; an empty one holds for every row.

    Args:
        expression: DuckDB's expression syntax, over the columns; attributes may also be spelled as CelebA does.
        columns: the names that the view has.

    Raises:
        ConfigError: if this is not one expression, or it names a column that there is not.
    """
    if not expression.strip():
        return Condition(sql="true", columns=())
    tree = _parse(expression)
    named: dict[str, None] = {}
    for column in list(tree.find_all(exp.Column, bfs=False)):
        name = _known(column, columns=columns, expression=expression)
        named[name] = None
        bare = exp.column(name, quoted=True)
        wanted = _label(name) if name in ATTRIBUTES and _is_boolean_place(column) else bare
        if column is tree:
            tree = wanted
        else:
            column.replace(wanted)
    return Condition(sql=tree.sql(dialect="duckdb", comments=False), columns=tuple(named))


def known_column(name: str, *, columns: Sequence[str]) -> str:
    """The column that a user means by a name in any case, or by CelebA's spelling of an attribute.

    Raises:
        ConfigError: if there is none.
    """
    if name in columns:
        return name
    lower = {column.lower(): column for column in columns}
    try:
        attribute = attribute_name(name)
    except KeyError:
        attribute = ""
    for meant in (name.lower(), attribute):
        if meant in lower:
            return lower[meant]
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    hint = f"; did you mean {lower[close[0]]}?" if close else ""
    raise ConfigError(f"there is no column {name!r}{hint}")


def _parse(expression: str) -> exp.Condition:
    expression = _with_names(expression)
    # sqlglot tells of statements that it does not know in its log; we say it in our own words.
    logging.getLogger("sqlglot").setLevel(logging.ERROR)
    try:
        trees = sqlglot.parse(expression, dialect="duckdb")
    except SqlglotError as error:
        raise ConfigError(f"expression {expression!r}: {_place(error)}; an example: {EXAMPLE}") from error
    if len(trees) != 1:
        raise ConfigError(
            f"expression {expression!r}: one expression is wanted, this is {len(trees)}; join them by `and`"
        )
    tree = trees[0]
    if not isinstance(tree, exp.Condition):
        raise ConfigError(f"expression {expression!r}: not a condition on a face; an example: {EXAMPLE}")
    refused = next(tree.find_all(*_REFUSED), None)
    if refused is not None:
        text = refused.sql(dialect="duckdb")
        raise ConfigError(f"expression {expression!r}: no place in a condition for {text!r}; --sql takes any query")
    return tree


def _with_names(expression: str) -> str:
    """CelebA's `5_o_Clock_Shadow`, which SQL would read as a number and more, under our name; quoted it is a name."""
    pieces = _QUOTED.split(expression)
    pieces[::2] = [_NUMBERED.sub("five_o_clock_shadow", piece) for piece in pieces[::2]]
    return "".join(pieces)


def _place(error: SqlglotError) -> str:
    details = (getattr(error, "errors", None) or [{}])[0]
    what, column = str(details.get("description", "")), details.get("col")
    if what.startswith("Required keyword"):  # the rest names a class of sqlglot's
        what = "something is missing after it"
    return f"cannot be read at character {column}: {what}" if column else "cannot be read"


def _known(column: exp.Column, *, columns: Sequence[str], expression: str) -> str:
    table = column.table or VIEW
    try:
        name = known_column(column.name if table == VIEW else f"{table}.{column.name}", columns=columns)
    except ConfigError as error:
        quoted = "; text takes single quotes" if getattr(column.this, "quoted", False) else ""
        raise ConfigError(f"expression {expression!r}: {error}{quoted}") from error
    return name


def _label(attribute: str) -> exp.Condition:
    """`CASE WHEN face_index >= 0 THEN (labels >> k) & 1 = 1 END`: null, not false, in a row without a face."""
    bit = ATTRIBUTES.index(attribute)
    sql = f"(CASE WHEN face_index >= 0 THEN ((labels >> {bit}) & 1) = 1 END)"
    return sqlglot.parse_one(sql, dialect="duckdb", into=exp.Condition)


def _is_boolean_place(node: exp.Condition) -> bool:
    """True where SQL expects true or false: the whole, under and/or/not, a CASE's condition, beside TRUE or FALSE, as
    BOOLEAN."""
    parent = node.parent
    if parent is None or isinstance(parent, exp.And | exp.Or | exp.Not | exp.Xor):
        return True
    if isinstance(parent, exp.Paren):
        return _is_boolean_place(parent)
    if isinstance(parent, exp.If):
        in_simple_case = isinstance(parent.parent, exp.Case) and parent.parent.this is not None
        return parent.this is node and not in_simple_case
    if isinstance(parent, exp.Cast):
        return parent.to.is_type("boolean")
    if isinstance(parent, exp.In):
        return parent.this is node and all(isinstance(one.unnest(), exp.Boolean) for one in parent.expressions)
    if isinstance(parent, exp.EQ | exp.NEQ | exp.Is):
        other = parent.expression if parent.this is node else parent.this
        return isinstance(other.unnest(), exp.Boolean)
    return False
