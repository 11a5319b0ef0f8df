"""`carousel serve`."""

from __future__ import annotations

import argparse

from scheduler.observing.logs import configure
from server.commands.ending import CRASHED, complain, run_until_signal
from server.commands.flags import ConfigFlags
from server.config import ServeConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `carousel serve`, and the function that runs it, which raises `UsersFileError` and
    `LedgerError`."""
    parser.usage = "carousel serve [options]"
    flags = ConfigFlags(parser, ServeConfig)
    parser.set_defaults(run=lambda args: _run(args, flags))


def _run(args: argparse.Namespace, flags: ConfigFlags[ServeConfig]) -> int:
    config = flags.read(args)
    configure(config.log_level.upper(), config.log_format)
    from scheduler.client.async_engine import EngineStartError
    from scheduler.client.handle import abandon_engines
    from server.api.responses_api.store import StoreError
    from server.batches.store import BatchStoreError
    from server.http.spans import OtelMissingError
    from server.http.tls import TlsError
    from server.serving import CannotListenError, EngineLostError, serve

    try:
        run_until_signal(serve(config), abandon_engines)
    except (
        EngineStartError,
        CannotListenError,
        OtelMissingError,
        StoreError,
        BatchStoreError,
        TlsError,
    ) as error:
        return complain(args, str(error))
    except EngineLostError as error:
        return complain(args, str(error), status=CRASHED)
    return 0
