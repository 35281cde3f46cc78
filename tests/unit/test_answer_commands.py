"""The exit status of a command that answers with it: no error may look like an answer."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from addon.cli.answers import AnswerCommand


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (click.ClickException("It is away."), 3, "Error: It is away."),
        (click.UsageError("No such day."), 3, "Error: No such day."),
        (ZeroDivisionError("a fault"), 3, "ZeroDivisionError: a fault"),
        (click.exceptions.Exit(2), 2, ""),
        (KeyboardInterrupt(), 130, "Aborted!"),
    ],
)
def test_every_error_is_no_answer(raised: BaseException, status: int, message: str) -> None:
    @click.command(cls=AnswerCommand)
    def command() -> None:
        raise raised

    done = CliRunner().invoke(command)
    assert done.exit_code == status
    assert message in done.stderr
