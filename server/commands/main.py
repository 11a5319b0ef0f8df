"""The `carousel` command. What is slow to import is imported by the command that needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from pydantic import ValidationError

from scheduler.core.request import InvalidRequestError
from server.commands import batch, bench, doctor, generate, serve, top, usage, users
from server.commands.ending import FAILED, INTERRUPTED, WRONG_USAGE, complain
from server.commands.flags import problems
from server.commands.settings import ConfigFileError
from server.commands.strangers import strangers, told_of
from server.users.directory import UsersFileError
from server.users.ledger import LedgerError

_PRECEDENCE = """\
An option is also an environment variable (--block-size: CAROUSEL_BLOCK_SIZE) and a line of the YAML file that
--config names (block_size: 16). A flag wins over the environment, the environment over the file.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. The result is its exit status."""
    if argv is None and sys.getfilesystemencoding() != "utf-8":
        _begin_again_in_utf8()
    args = _parser().parse_args(argv)
    if args.command != "doctor" and (found := strangers()):
        return complain(args, told_of(found))
    try:
        status: int = args.run(args)
    except ValidationError as error:
        return complain(args, *problems(error), status=WRONG_USAGE)
    except InvalidRequestError as error:
        return complain(args, str(error), status=WRONG_USAGE)
    except (ConfigFileError, UsersFileError, LedgerError) as error:
        return complain(args, str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader left first, as in `carousel generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return status


def _begin_again_in_utf8() -> None:
    """Some locales cannot say the names of files, nor what models answer."""
    # The flag holds where Python is told not to look at its environment, which processes to come do.
    command = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
    os.execve(sys.executable, command, os.environ | {"PYTHONUTF8": "1"})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="carousel",
        description="Continuous batching of language models, for several people who share one machine.",
        epilog="carousel COMMAND --help explains a command and its options.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"carousel {version('carousel-llm')}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)

    def add(
        name: str,
        add_arguments: Callable[[argparse.ArgumentParser], None],
        summary: str,
        epilog: str | None = None,
    ) -> None:
        add_arguments(
            commands.add_parser(name, help=summary, description=summary, epilog=epilog, allow_abbrev=False)
        )

    add("serve", serve.add_arguments, "Serve a model over HTTP, with OpenAI's API.", _PRECEDENCE)
    add("generate", generate.add_arguments, "Answer one prompt on the terminal.", _PRECEDENCE)
    add("bench", bench.add_arguments, "Load-test any OpenAI-compatible server: throughput, latency, goodput.")
    add("batch", batch.add_arguments, "Answer a file of requests; a run that was killed goes on.", _PRECEDENCE)
    add("top", top.add_arguments, "Watch a running server in the terminal: seats, blocks, speed, users.")
    add(
        "users",
        users.add_arguments,
        "Say who may use a server: add, list, disable and enable users, and give them new keys.",
    )
    add("usage", usage.add_arguments, "Tell who used how much on which day.")
    add("doctor", doctor.add_arguments, "Tell what this machine gives, and what would make it faster.")
    return parser
