"""`python -m kit` is the `kit` command."""

import sys

from kit.utils.shadowing import explain_failed_import

try:
    from kit.cli.app import app
except (ImportError, AttributeError) as error:
    explained = explain_failed_import(error)  # it was the user's `typer.py`
    if explained is None:
        raise
    sys.exit(str(explained))

if __name__ == "__main__":
    app(prog_name="kit")
