"""Text files are UTF-8 whatever the locale: whoever opens one says so."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py"), *ROOT.glob("experiments/*.py")])
FILES += [ROOT / f"tests/test_{name}.py" for name in ("encoding", "known_graph", "report", "spread", "watch")]
OPENERS = {"open": 1, "fdopen": 1, "NamedTemporaryFile": 0, "TemporaryFile": 0}  # place of the mode


def leaves_the_encoding_open(call):
    """Does this call open a file as text without saying its encoding? Of methods, `open` is taken to be Path's."""
    name = getattr(call.func, "id", None) or getattr(call.func, "attr", None)
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    if name in ("read_text", "write_text"):
        return True
    owner = ast.unparse(call.func).rpartition(".")[0]
    if name not in OPENERS or owner in ("os", "Image") and name == "open":
        return False
    place = OPENERS[name] - (name == "open" and owner not in ("", "io"))
    modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] + call.args[place : place + 1]
    default = "r" if "open" in name else "w+b"
    mode = ast.literal_eval(modes[0]) if modes else default
    return "b" not in mode


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_whoever_opens_a_text_file_says_utf_8(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert [f"line {call.lineno}" for call in calls if leaves_the_encoding_open(call)] == []
    encodings = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "encoding"]
    assert {ast.unparse(encoding) for encoding in encodings} <= {"'utf-8'"}


@pytest.mark.parametrize(
    "code",
    ["open(p)", "open(p, 'w')", "open(p, mode='a')", "io.open(p)", "p.open()", "p.open('w')", "os.fdopen(3, 'w')"]
    + ["p.read_text()", "p.write_text(t)", "Path(p).read_text(errors='replace')", "tempfile.NamedTemporaryFile('w')"],
)
def test_what_leaves_the_encoding_open_is_found(code):
    assert leaves_the_encoding_open(ast.parse(code).body[0].value)
    with_encoding = code[:-1].removesuffix("(") + ("(" if code.endswith("()") else ", ") + "encoding='utf-8')"
    assert not leaves_the_encoding_open(ast.parse(with_encoding).body[0].value)


@pytest.mark.parametrize(
    "code",
    ["open(p, 'rb')", "open(p, mode='wb')", "p.open('ab')", "Image.open(p)", "os.open(p, os.O_RDWR)", "read(p)"]
    + ["tempfile.TemporaryFile()", "p.write_bytes(t)"],
)
def test_bytes_need_no_encoding(code):
    assert not leaves_the_encoding_open(ast.parse(code).body[0].value)
