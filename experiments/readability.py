"""How densely the training scripts are written, as a Markdown table.

    python experiments/readability.py                    # all scripts as they are
    python experiments/readability.py --revision 0.1.0   # as they were at a revision that git knows
    python experiments/readability.py FILE [FILE ...]    # other files, for comparison

An operation is a call, an arithmetic, logical or comparison operator, an index or a comprehension; they are counted
per line that holds code, docstrings aside. A tuple assignment has a tuple on its left. For orientation, CleanRL's
ppo.py has 48 characters per non-blank line and 11 lines over 100 characters.
"""

import ast
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from errors import one_sentence

with one_sentence():
    import tyro

ROOT = Path(__file__).resolve().parents[1]
OPERATIONS = (ast.Call, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Subscript)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
HEADER = ["script", "lines", "characters per non-blank line", "lines over 100", "comprehensions", "tuple assignments"]
HEADER += ["operations per line of code"]


@dataclass
class Args:
    files: tyro.conf.Positional[list[Path]] = field(default_factory=list)
    """files to measure; if none, every training script"""
    revision: str | None = None
    """measure the files as they were at this revision"""


def scripts():
    """The training scripts, relative to the repository."""
    paths = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("baselines/*.py"))]
    return [path.relative_to(ROOT) for path in paths]


def read(path, revision):
    """The file's text, or None if there was none at the revision."""
    if revision is None:
        return (ROOT / path).read_text(encoding="utf-8")
    shown = subprocess.run(["git", "show", f"{revision}:{path.as_posix()}"], cwd=ROOT, capture_output=True)
    return shown.stdout.decode("utf-8") if shown.returncode == 0 else None


def is_tuple_assignment(node):
    """Whether a tuple stands on the left of an assignment."""
    return isinstance(node, ast.Assign) and any(isinstance(target, ast.Tuple) for target in node.targets)


def is_docstring(node):
    """Whether an expression is nothing but a text."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def code_lines(tree):
    """The numbers of the lines on which code begins or goes on, docstrings aside."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.expr | ast.stmt) and not is_docstring(node):
            lines.add(node.lineno)
    return lines


def measure(text):
    """The cells of a row, in the order of HEADER without its first."""
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    lines = text.splitlines()
    written = [line for line in lines if line.strip()]
    operations = sum(isinstance(node, OPERATIONS + COMPREHENSIONS) for node in nodes)
    return [
        len(lines),
        round(sum(map(len, written)) / len(written)),
        sum(len(line) > 100 for line in lines),
        sum(isinstance(node, COMPREHENSIONS) for node in nodes),
        sum(is_tuple_assignment(node) for node in nodes),
        round(operations / len(code_lines(tree)), 1),
    ]


def main(args):
    rows = [HEADER, ["---"] * len(HEADER)]
    for path in args.files or scripts():
        text = read(path, args.revision)
        if text is not None:
            rows.append([f"`{path}`", *measure(text)])
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
