"API entries of the documentation: a wrapped call, the docstring, a table of parameters, and the public methods of a class."

import ast
import inspect
import io
import re
import tokenize
from dataclasses import is_dataclass
from functools import cache, cached_property
from importlib import import_module
from inspect import Parameter
from textwrap import dedent, fill
from typing import Any

from fastcore.docments import docments
from nbdev.doclinks import NbdevLookup
from nbdev.showdoc import BasicMarkdownRenderer

WIDTH = 76  # Characters in a line of a call
LONGEST_DEFAULT = 40  # Characters; longer ones are left to the source
DASHES = (24, 20, 14, 60)  # Pandoc reads the relative widths of columns from them
SELF = ("self", "cls", "_cls")
STARS = {Parameter.VAR_POSITIONAL: "*", Parameter.VAR_KEYWORD: "**"}


class ApiRenderer(BasicMarkdownRenderer):
    "Render `show_doc(sym)`; named as `renderer` in settings.ini."

    def _repr_markdown_(self) -> str:
        return self.markdown

    @cached_property
    def markdown(self) -> str:
        "The entry, for which the documentation build asks twice."
        symbol = exported(self.sym)
        return f"---\n\n{source_link(symbol)}{entry(symbol, self.nm, self.title_level)}"


def exported(symbol: Any) -> Any:
    "The package's own version of a symbol: the documentation build executes exported cells once more, without their source."
    if getattr(symbol, "__module__", None) != "__main__":
        return symbol
    found = [import_symbol(*names) for names in definitions(symbol.__qualname__)]
    same = [other for other in found if inspect.getdoc(other) == inspect.getdoc(symbol)]  # Of several with this name
    return [*same, *found, symbol][0]


def definitions(name: str) -> list[tuple[str, str]]:
    "The modules that define a name, each with the name."
    return [(module, name) for key, module in modules().items() if key == f"{module}.{name}"]


@cache
def modules() -> dict[str, str]:
    "The module of every name in the index of the documentation, which knows all libraries that are linked to."
    found = [(key, entry) for key, entry in NbdevLookup().syms.items() if isinstance(entry, tuple)]
    return {key: entry[1].removesuffix(".py").replace("/", ".") for key, entry in found}


def import_symbol(module: str, name: str) -> Any:
    "A function, class or method of a module."
    target = import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    return target


def source_link(symbol: Any) -> str:
    "A link to the lines that define a symbol of the package; nothing for others."
    found = NbdevLookup()[f"{symbol.__module__}.{symbol.__qualname__}"]
    if not isinstance(found, tuple):
        return ""
    url = f"{found[2]}#L{inspect.getsourcelines(symbol)[1]}"
    return f'[source]({url}){{style="float:right; font-size:smaller"}}\n\n'


def entry(symbol: Any, name: str, level: int) -> str:
    "Markdown of a function or class; methods and properties of a class follow one level deeper."
    parts = [f"{'#' * level} {name}", call(symbol, name), escape(inspect.getdoc(symbol) or ""), parameters(symbol)]
    if inspect.isclass(symbol):
        own = [(key, value) for key, value in vars(symbol).items() if not key.startswith("_")]
        parts.append(properties([(key, value) for key, value in own if is_property(value)]))
        methods = [(key, getattr(symbol, key)) for key, value in own if isinstance(value, FUNCTIONS)]
        parts += [entry(method, f"{name}.{key}", level + 1) for key, method in methods if inspect.getdoc(method)]
    return "\n\n".join(filter(None, parts))


FUNCTIONS = (type(entry), classmethod, staticmethod)


def is_property(value: Any) -> bool:
    "Whether a class attribute is a property, cached or not."
    return isinstance(value, property) or type(value).__name__ == "cached_property"


def signature(symbol: Any) -> list[Parameter]:
    "The parameters of a call, without `self`; none if Python cannot tell."
    try:
        found = inspect.signature(symbol).parameters.values()
    except (ValueError, TypeError):
        return []
    return [parameter for parameter in found if parameter.name not in SELF]


def call(symbol: Any, name: str) -> str:
    "The call as Python code, packed into lines of `WIDTH` characters."
    words, keyword_only = [], False
    for parameter in signature(symbol):
        if parameter.kind is Parameter.VAR_POSITIONAL:
            keyword_only = True
        if parameter.kind is Parameter.KEYWORD_ONLY and not keyword_only:
            words, keyword_only = [*words, "*"], True
        default = "" if parameter.default is Parameter.empty else f"={show_default(parameter.default)}"
        words.append(f"{STARS.get(parameter.kind, '')}{parameter.name}{default}")
    arrow = f" -> {returned}" if (returned := returned_type(symbol)) else ""
    line = f"{name}({', '.join(words)}){arrow}"
    if len(line) > WIDTH and words:
        kept = ", ".join(word.replace(" ", "\0") for word in words)  # A default is never split
        body = fill(kept, WIDTH - 4, break_long_words=False, break_on_hyphens=False).replace("\0", " ")
        line = f"{name}(\n    " + body.replace("\n", "\n    ") + f",\n){arrow}"
    return f"```python\n{line}\n```"


def returned_type(symbol: Any) -> str:
    "What a function returns; nothing for a class or where it is not said."
    try:
        return "" if inspect.isclass(symbol) else show_type(inspect.signature(symbol).return_annotation)
    except (ValueError, TypeError):
        return ""


def show_default(value: Any) -> str:
    "A default as it is written in code, shortened to `...`."
    text = getattr(value, "__name__", None) or repr(value)
    return "..." if len(text) > LONGEST_DEFAULT or text.startswith("<") else text


def show_type(annotation: Any) -> str:
    "An annotation without the modules of its names."
    if annotation is Parameter.empty or annotation is None:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", "", text)


def escape(text: str) -> str:
    "Text for a paragraph or table cell: only backticks keep their meaning, and no `|` ends a cell."
    pieces = re.split(r"(`[^`\n]+`)", text)
    for position, piece in enumerate(pieces):
        if position % 2 and "|" in piece:
            inner = piece[1:-1].replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
            pieces[position] = f"<code>{inner}</code>"
        elif position % 2 == 0:
            pieces[position] = re.sub(r"([\\|<>*\[\]$~^@]|\b_\B|\B_\b)", r"\\\1", piece)
    return "".join(pieces)


def code(text: str) -> str:
    "Code in a table cell, if there is any."
    return escape(f"`{text}`") if text and "`" not in text else escape(text)


def table(head: list[str], rows: list[list[str]]) -> str:
    "A pipe table without the columns that are empty in all rows."
    if not rows:
        return ""
    used = [column for column in range(len(head)) if any(row[column] for row in rows)]
    dashes = ["-" * DASHES[column if len(head) == 4 else min(3, column + (column > 1))] for column in range(len(head))]
    lines = [[line[column] for column in used] for line in (head, dashes, *rows)]
    pipes = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f'<div class="parameters">\n\n{pipes}\n\n</div>'


def parameters(symbol: Any) -> str:
    "The table of parameters, and of what a function returns."
    comments, rows = comments_of(symbol), []
    for parameter in signature(symbol):
        default = "" if parameter.default is Parameter.empty else show_default(parameter.default)
        meaning = escape(one_line(comments.get(parameter.name)))
        anchor = f' id="{symbol.__name__}.{parameter.name}"' if is_dataclass(symbol) else ""  # For links to an option
        # In backticks, it might become a link
        name = f"<code{anchor}>{STARS.get(parameter.kind, '')}{parameter.name}</code>"
        rows.append([name, escape(show_type(parameter.annotation)), code(default), meaning])
    if meaning := one_line(comments.get("return")):
        rows.append(["**returns**", escape(returned_type(symbol)), "", escape(meaning)])
    return table(["parameter", "type", "default", "meaning"], rows)


def properties(found: list[tuple[str, Any]]) -> str:
    "The table of a class's documented properties."
    rows = []
    for name, value in found:
        getter = getattr(value, "fget", None) or value.func
        returned = show_type(inspect.signature(getter).return_annotation)
        if meaning := one_line(inspect.getdoc(value)):
            rows.append([code(name), escape(returned), escape(meaning)])
    return table(["property", "type", "meaning"], rows)


def one_line(text: str | None) -> str:
    "Text without its line breaks."
    return " ".join((text or "").split())


def comments_of(symbol: Any) -> dict[str, str | None]:
    "The docment of each parameter or field."
    if not inspect.isclass(symbol):
        return docments(symbol, args_kwargs=True)
    if not (is_dataclass(symbol) or hasattr(symbol, "_fields")):
        return docments(symbol.__init__, args_kwargs=True)
    comments = {}
    for base in reversed(symbol.__mro__):
        if base.__module__ != "builtins" and inspect.get_annotations(base):
            comments |= field_comments(base)
    return comments


def field_comments(cls: type) -> dict[str, str]:
    "The comment behind or above each annotated field of a class."
    source = dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    notes = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    statements = ast.parse(source).body[0].body
    taken = {line for node in statements for line in range(node.lineno, node.end_lineno + 1)}
    comments = {}
    for node in statements:
        if isinstance(node, ast.AnnAssign):
            found = [notes[line] for line in range(node.lineno, node.end_lineno + 1) if line in notes]
            line = node.lineno - 1
            while (not found or line < node.lineno - 1) and line in notes and line not in taken:
                found.insert(0, notes[line])
                line -= 1
            comments[node.target.id] = " ".join(found)
    return comments
