"""What ends the programs of this folder in one sentence on stderr and exit status 2, instead of a traceback."""

import contextlib
import os
import sys
from pathlib import Path

INSTALL = "pip install -r requirements.txt -r experiments/requirements.txt"
INSTALL_SMACLITE = (
    "pip install --no-deps -r requirements-smaclite.txt && "
    'pip install -r requirements.txt "gymnasium>=1.4" rtree scikit-learn pygame'
)
SMACLITE_PACKAGES = ("smaclite", "rtree", "sklearn", "pygame")  # it and what it needs


class UserError(Exception):
    """Something the user can put right."""


def is_package(name):
    """Whether a module of this name comes with a package: it is no part of one, of Python or of this folder."""
    own = (Path(__file__).parent / f"{name}.py").exists()
    return name is not None and "." not in name and name not in sys.stdlib_module_names and not own


@contextlib.contextmanager
def one_sentence():
    """Reports a UserError, a package that is not installed and what the system refuses, and exits with status 2.

    Everything else is a fault of the program and keeps its traceback, an import that fails for another reason included.
    A program wraps its imports in it as well as its work.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # None: closed by whoever started the program
                sys.stdout.flush()  # at exit it would be too late to report that it fails
        return
    except UserError as error:
        sentence = str(error)
    except ModuleNotFoundError as error:
        if not is_package(error.name):
            raise
        command = INSTALL_SMACLITE if error.name in SMACLITE_PACKAGES else INSTALL
        sentence = f"the package {error.name} is not installed: {command}"
    except OSError as error:
        sentence = str(error)
        if isinstance(error, BrokenPipeError):
            sentence = "the reader of its output has gone"
        with contextlib.suppress(OSError, AttributeError):  # what stdout still holds shall not fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(f"{Path(sys.argv[0]).name}: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(2)
