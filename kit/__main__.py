"""`python -m kit` is the `kit` command."""

from kit.cli.app import app

if __name__ == "__main__":
    app(prog_name="kit")
