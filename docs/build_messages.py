"""The site's page of messages, every error message of the project, out of the source.

    python docs/build_messages.py           # print it

mkdocs takes it from here when it builds the site, so that a new message needs no edit of a page.

A message is the text that an error is made of: it stands in the call of a class named `…Error`, or
behind a name or in the `return` of a helper that is called there; in what `config/messages.py`
returns; or in a line that is printed as an error. Values stand in angle brackets, by their name.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
PAGE = "messages.md"
MENDS = ROOT / "docs" / "mends.yaml"
SOURCES = ("platform/stillhouse", "kernels/stillhouse_kernels")
ONLY_MESSAGES = "platform/stillhouse/config/messages.py"
# Our own mistakes, and what is caught and told by another message.
NOT_TOLD = ("AssertionError", "ReadError")
HEAD = """# Messages

Every error message of the project, by the file that raises it, taken from the source when this site
was built. What a run fills in stands between `<` and `>`, what is
not always there between `[` and `]`. A message says the key, the value, what was expected and the
way out; where it does not, the way out follows it here. The likeliest ones are told with what leads
to them in [Troubleshooting](troubleshooting.md).
"""


def page(root: Path = ROOT) -> str:
    """Return the page of the source under `root`."""
    files = [p for source in SOURCES for p in sorted((root / source).rglob("*.py"))]
    trees = {p.relative_to(root).as_posix(): ast.parse(p.read_text("utf-8")) for p in files}
    own = {path: _constants(tree) for path, tree in trees.items()}
    everywhere = _of_one_value(own)
    mends = {m["message"]: m["mend"] for m in yaml.safe_load(MENDS.read_text("utf-8"))}
    lines, area = [HEAD], ""
    for path, tree in trees.items():
        found = list(dict.fromkeys(messages(tree, path == ONLY_MESSAGES, everywhere | own[path])))
        if not found:
            continue
        package = "/".join(path.split("/")[: 3 if path.startswith("platform") else 2])
        if package != area:
            area = package
            docstring = ast.get_docstring(trees[f"{area}/__init__.py"]) or ""
            lines.append(f"## {area.rpartition('/')[2]}\n\n{docstring.splitlines()[0]}\n")
        lines.append(f"### {path.split('/', 2)[2]}\n")
        lines += [f"- {_code(m)}{': ' + mends[m] if m in mends else ''}" for m in found] + [""]
    return "\n".join(lines).rstrip() + "\n"


def messages(tree: ast.Module, returned_too: bool, known: Mapping[str, str]) -> Iterator[str]:
    """Yield the messages of a module, in its order.

    Args:
        tree: the module.
        returned_too: whether what its functions return are messages.
        known: texts by the names in capitals that stand for them.
    """
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Call | ast.Return)]
    for node in sorted(nodes, key=lambda n: n.lineno):
        text = node.value if isinstance(node, ast.Return) else node.args[0] if node.args else None
        if text is None:
            continue
        if isinstance(node, ast.Return):
            told = returned_too
        else:
            name = _name(node.func)
            error = name.endswith("Error") or name == "TrainingDiverged"
            told = (error and name not in NOT_TOLD) or _words(text).startswith("error: of")
        if told:
            yield from (_text(n, known) for n in _alternatives(text, tree) if _says(n))


def _alternatives(node: ast.expr, tree: ast.Module) -> list[ast.expr]:
    """Return the texts that an expression may be: those of a condition, a helper, or a name."""
    if isinstance(node, ast.IfExp):
        return [node.body, node.orelse]
    if isinstance(node, ast.Name):
        bound = [n for n in ast.walk(tree) if isinstance(n, ast.Assign)]
        return [n.value for n in bound if _name(n.targets[0]) == node.id]
    if isinstance(node, ast.Call):
        helpers = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        inside = [n for h in helpers if h.name == _name(node.func) for n in ast.walk(h)]
        returned = [n.value for n in inside if isinstance(n, ast.Return) and n.value]
        names = [a for a in node.args if isinstance(a, ast.Name)]
        return returned or [text for name in names for text in _alternatives(name, tree)]
    return [node]


def _text(node: ast.AST, known: Mapping[str, str]) -> str:
    """Return a text in one line, with the names of what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value).replace("\n", "\\n")
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, known) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, known)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and _says(node):
        return _text(node.left, known) + _text(node.right, known)
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, ast.Call) and _name(node.func) == "did_you_mean":
        return "[; did you mean …?]"
    if isinstance(node, ast.IfExp) and isinstance(node.orelse, ast.Constant) and _says(node.body):
        return f"[{_text(node.body, known)}]"
    joined = isinstance(node, ast.Call) and _name(node.func) == "join"
    return f"<{_filled_in(node)}{', …' if joined else ''}>"


def _filled_in(node: ast.AST) -> str:
    """Name what is filled in: a variable, or what it is taken from."""
    if isinstance(node, ast.Call):
        return _filled_in(node.args[-1] if node.args else getattr(node.func, "value", node.func))
    if isinstance(node, ast.Subscript):
        return _filled_in(node.slice if _words(node.slice) else node.value)
    if isinstance(node, ast.BoolOp):
        return _filled_in(node.values[0])
    if isinstance(node, ast.IfExp):
        return _filled_in(node.orelse if isinstance(node.body, ast.Constant) else node.body)
    if isinstance(node, ast.GeneratorExp | ast.Starred):
        return _filled_in(node.elt if isinstance(node, ast.GeneratorExp) else node.value)
    name = _name(node) or (_words(node) if isinstance(node, ast.Constant) else "")
    name = name.strip("_").replace("_", " ") or ast.unparse(node)
    return name.lower() if name.isupper() and len(name) > 1 else name


def _name(node: ast.AST) -> str:
    return str(getattr(node, "id", getattr(node, "attr", "")))


def _words(node: ast.AST) -> str:
    """Return the texts that stand in an expression."""
    inside = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
    return "".join(value for value in inside if isinstance(value, str))


def _says(node: ast.AST) -> bool:
    """Return whether an expression holds words of its own."""
    return " " in _words(node).strip() or isinstance(node, ast.JoinedStr)


def _constants(tree: ast.Module) -> dict[str, str]:
    """Return the texts and numbers that a module binds to names in capitals."""
    bound = {_name(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}
    return {
        name: str(node.value)
        for name, node in bound.items()
        if name.isupper() and isinstance(node, ast.Constant) and node.value
    }


def _of_one_value(own: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return the names that have one value in all modules: these import them from each other."""
    values = defaultdict(set)
    for texts in own.values():
        for name, text in texts.items():
            values[name].add(text)
    return {name: next(iter(texts)) for name, texts in values.items() if len(texts) == 1}


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def on_files(files: Any, config: Any) -> Any:
    """Put the page among those that mkdocs builds."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=page()))
    return files


if __name__ == "__main__":
    print(page(), end="")
