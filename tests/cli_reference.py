"""Writes docs/cli.md from the commands: `python -m tests.cli_reference`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from job.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """# The command line

What `job COMMAND --help` prints. To change this page, change the docstrings in `job/cli.py` and run
`python -m tests.cli_reference`. Every command ends with one of the [exit codes](troubleshooting.md#exit-codes).
"""


def reference() -> str:
    """Return the whole page."""
    return HEAD + "".join(_commands(click.Context(main, info_name="job", **main.context_settings), main))


def _commands(parent: click.Context, group: click.Group) -> Iterator[str]:
    for name, command in sorted(group.commands.items()):
        context = click.Context(command, info_name=name, parent=parent, max_content_width=110)
        context.terminal_width = 110
        if isinstance(command, click.Group):
            yield from _commands(context, command)
        else:
            yield f"\n## `{context.command_path}`\n\n```text\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(reference())
