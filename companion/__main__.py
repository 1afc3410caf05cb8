"""`python -m companion`: see companion.cli."""

import sys

try:
    from companion.cli import app
    from companion.rag import commands
except ModuleNotFoundError as error:
    if error.name not in ("typer", "rich"):
        raise
    sys.exit(f"The command line needs {error.name}: install the extra `app` (pip install '.[app]').")

app.add_typer(commands.app, name="rag")

if __name__ == "__main__":
    app(prog_name="python -m companion")
