"""Commands whose exit status is an answer, so that every error needs another status."""

from __future__ import annotations

import contextlib
import traceback
from typing import TYPE_CHECKING, Any

import click
from click.exceptions import Exit

if TYPE_CHECKING:
    from collections.abc import Iterator


_INTERRUPTED_EXIT = 130  # what shells report for SIGINT


class NoAnswerError(click.ClickException):
    """The command could not find out. The exit status tells that from every answer."""

    exit_code = 3


class _InvalidUseError(click.UsageError):
    """An option or argument is not valid."""

    exit_code = NoAnswerError.exit_code


class AnswerCommand(click.Command):
    """A command whose exit statuses 0 to 2 are answers, so that every error needs another."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        with _no_answer():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with _no_answer():
            return super().invoke(ctx)


@contextlib.contextmanager
def _no_answer() -> Iterator[None]:
    try:
        yield
    except click.UsageError as e:
        raise _InvalidUseError(e.format_message(), e.ctx) from None
    except click.ClickException as e:
        raise NoAnswerError(e.message) from None
    except Exit:
        raise
    except (KeyboardInterrupt, click.Abort):
        click.echo("Aborted!", err=True)
        raise Exit(_INTERRUPTED_EXIT) from None
    except Exception:  # noqa: BLE001 - a fault of ours must not look like the answer 1, Python's own status
        traceback.print_exc()
        raise Exit(NoAnswerError.exit_code) from None
