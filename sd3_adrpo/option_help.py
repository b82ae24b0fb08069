"""One line of help per option, read from the comments that stand beside a dataclass's fields."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize


def option_help(cls: type) -> dict[str, str]:
    """Field name to the comment at the end of its line, else to the one that stands alone above it."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except OSError:  # no source beside the compiled module
        return {}
    lines = source.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            above = node.lineno - 1
            alone = comments.get(above, "") if lines[above - 1].lstrip().startswith("#") else ""
            found[node.target.id] = comments.get(node.end_lineno) or alone
    return found


def first_line(cls: type) -> str:
    """First line of a class's docstring; a dataclass without one has a made-up signature there, which is left out."""
    text = (inspect.getdoc(cls) or "").partition("\n")[0]
    return "" if text.startswith(f"{cls.__name__}(") else text.rstrip(":")
