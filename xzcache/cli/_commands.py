"""The commands, their options, and how results and errors are shown."""

from __future__ import annotations

import difflib
import json
import os
import sys
import time
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, NoReturn, ParamSpec

import click

from xzcache import manage
from xzcache._config import parse_bound, parse_root, shown_bound, shown_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

P = ParamSpec("P")

_FAILED: Final = 1
_BAD_INPUT: Final = 2
_INTERRUPTED: Final = 130


class BadInput(click.ClickException):
    """A value that is not accepted: the message names it and the accepted values."""

    exit_code = _BAD_INPUT


class OfSize(click.Command):
    """A command whose argument may begin with a minus: such a size is refused, and is no unknown option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the options, and then what is negative as an argument."""
        negative = [arg for arg in args if arg[:1] == "-" and arg[1:2].isdigit()]
        return super().parse_args(
            ctx, [*(arg for arg in args if arg not in negative), *(["--"] if negative else []), *negative]
        )


class Commands(click.Group):
    """A group that suggests the command that may be meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which there are."""
        if (given := args[0]) not in self.commands and not given.startswith("-"):
            close = difflib.get_close_matches(given, self.commands, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"give one of {', '.join(self.commands)}"
            raise BadInput(f"no command is called {given!r}: {hint}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  xzcache info                             how full the cache is
  xzcache ls                               what is in it
  xzcache ls era5                          how much of each array of that source
  xzcache clear era5 --dry-run             what clearing it would remove
  xzcache clear --older-than 30d --yes     remove what was not used for a month
  xzcache resize 50GB                      how much it may hold
  xzcache report -o report.html            how it is used, and how large it should be
  xzcache top                              what is read at the moment
  xzcache warm s3://bucket/era5.zarr       fetch it before it is needed
  xzcache pin era5 t2m --for 7d            keep an array for a week
\b
Exit codes: 0 all is well, 1 trouble was found or the command failed, 2 bad input.
Completion of the shell: eval "$(_XZCACHE_COMPLETE=bash_source xzcache)", or zsh_source, fish_source.
""",
)
@click.version_option(package_name="xzcache")
@click.pass_context
def cli(context: click.Context) -> None:
    """See, fill, clear, size and check the cache of Zarr chunks that all processes of this machine share."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _directory(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "-d", "--directory", metavar="PATH", help="The cache directory; default: this user's cache on this machine."
    )(function)


def _json(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, with sizes in bytes.")(function)


def _scheduler(function: Callable[..., Any]) -> Callable[..., Any]:
    function = click.option(
        "--node", "nodes", multiple=True, metavar="NODE", help="With --scheduler: only this host, worker or node."
    )(function)
    return click.option("--scheduler", metavar="ADDRESS", help="Do it on each node of this Dask cluster.")(function)


def _yes(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("-y", "--yes", is_flag=True, help="Do not ask.")(function)


def _one_line_errors(function: Callable[P, None]) -> Callable[P, None]:
    """Errors that a user can act on become one line and an exit code."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> None:
        if kwargs.get("directory") is not None and kwargs.get("scheduler") is None:
            # with a scheduler, it is a path of the nodes
            try:
                parse_root(kwargs["directory"], "--directory")
            except ValueError as error:
                raise BadInput(str(error)) from error
        try:
            function(*args, **kwargs)
        except (manage.UnknownSource, TypeError, ValueError) as error:
            if not isinstance(error, manage.UnknownSource | manage.TooLarge) and "accepted" not in str(error):
                # a bug, and no bad input
                raise
            raise BadInput(str(error)) from error
        except OSError as error:
            raise click.ClickException(str(error)) from error

    return called


def _sources(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The names that a shell completes."""
    try:
        found = manage.ls(None, context.params.get("directory"))
    except (OSError, ValueError, TypeError):
        return []
    return [source.name for source in found if source.name.startswith(incomplete)]


# -- what is shown


def _print(result: Any, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result.as_dict(), indent=2, default=str))
    elif (pretty := _pretty(result)) is None:
        click.echo(repr(result))
    else:
        pretty()


def _pretty(result: Any) -> Callable[[], None] | None:
    """A function that prints a result in colours; None where nobody would see them."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return None
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return None
    table = result.table()
    if not table.rows and not table.pairs:
        return None
    console = Console(highlight=False)
    grid = Table(box=None, pad_edge=False, show_header=bool(table.rows), header_style="dim")
    if table.rows:
        for name in table.columns:
            grid.add_column(name, overflow="fold", justify="right" if name in _RIGHT else "left")
        for row in table.rows:
            grid.add_row(*(Text(cell) for cell in row))
    else:
        grid.add_column(style="dim")
        grid.add_column(overflow="fold")
        for name, value in (table.pairs or {}).items():
            grid.add_row(Text(name), Text(f"{_bar(table.bar, console.encoding)}{value}" if name == "used" else value))

    def show() -> None:
        console.print(grid)
        if table.note:
            console.print(Text(table.note, style="yellow"))

    return show


_RIGHT: Final = ("entries", "size", "share", "cached", "hits", "hit rate")


def _on_nodes(
    scheduler: str, nodes: tuple[str, ...], function: Callable[..., Any], *args: Any, as_json: bool, **kwargs: Any
) -> dict[Any, Any]:
    """Call a function once on each node of a cluster, and print the results."""
    from xzcache.dask import each_node

    with _cluster(scheduler) as client:
        found = each_node(client, function, *args, nodes=nodes or None, **kwargs)
    rows = []
    for node, result in found.items():
        failed = isinstance(result, Exception)
        figures = {"error": str(result)} if failed else {"result": _figures(result)}
        rows.append({"node": node.node, "hosts": node.hosts, "workers": node.workers, **figures})
        if not as_json:
            click.secho(f"{', '.join(node.hosts) or node.workers[0]} ({node.node[:8] or 'no cache'})", bold=True)
            click.echo(str(result))
    if as_json:
        click.echo(json.dumps(rows, indent=2, default=str))
    return found


def _figures(result: Any) -> Any:
    return result.as_dict() if hasattr(result, "as_dict") else _audited(result)


def _audited(audit: Any) -> dict[str, Any]:
    findings = [finding._asdict() for finding in audit.findings]
    figures = {"entries": audit.entries, "size": audit.size, "repaired": audit.repaired, "findings": findings}
    return {"directory": audit.root, "ok": audit.ok, **figures}


def _all_well(found: dict[Any, Any]) -> bool:
    return not any(isinstance(result, Exception) or not getattr(result, "ok", True) for result in found.values())


def _bar(share: float | None, encoding: str, width: int = 20) -> str:
    """A bar, where the bound is known and the terminal can show it."""
    if share is None or not encoding.lower().startswith("utf"):
        return ""
    full = round(share * width)
    return "█" * full + "░" * (width - full) + " "


def _end(*, ok: bool) -> None:
    if not ok:
        raise click.exceptions.Exit(_FAILED)


def _confirm(question: str, *, yes: bool) -> None:
    """Ask before anything is removed; without a terminal to ask at, remove nothing."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise BadInput(f"nothing was removed: there is no terminal to ask at, so give --yes ({question})")
    if not click.confirm(f"{question}?", err=True):
        raise click.ClickException("nothing was removed")


# -- the commands


@cli.command(
    epilog="""\b
Examples:
  xzcache info
  xzcache info --directory /scratch/cache --json
""",
    short_help="How full the cache is, and whether it is well.",
)
@_scheduler
@_directory
@_json
@_one_line_errors
def info(scheduler: str | None, nodes: tuple[str, ...], directory: str | None, as_json: bool) -> None:
    """Show where the cache is, how full it is, of how many sources, and what is wrong with it.

    Changes nothing. The exit code is 1 if the cache cannot be used; no cache yet is no trouble.
    """
    if scheduler is not None:
        _end(ok=_all_well(_on_nodes(scheduler, nodes, manage.info, directory, as_json=as_json)))
        return
    found = manage.info(directory)
    _print(found, as_json=as_json)
    _end(ok=found.ok)


@cli.command(
    epilog="""\b
Examples:
  xzcache ls
  xzcache ls s3://bucket/era5.zarr
  xzcache ls era5 --json
""",
    short_help="The sources in the cache, or the arrays of one.",
)
@click.argument("source", required=False, shell_complete=_sources)
@_directory
@_json
@_one_line_errors
def ls(source: str | None, directory: str | None, as_json: bool) -> None:
    """List the sources in the cache, largest first; with SOURCE, its arrays and how much of each is cached.

    SOURCE is a name from the list or an unambiguous part of one, or the URL or path of a source. Changes nothing.
    """
    found: manage.Sources | manage.Arrays = manage.ls(source, directory) if source else manage.ls(None, directory)
    _print(found, as_json=as_json)
    _end(ok=found.ok)


@cli.command(
    epilog="""\b
Examples:
  xzcache clear era5 --dry-run
  xzcache clear --older-than 7d
  xzcache clear --yes
""",
    short_help="Remove what is cached: all, a source, or what is old.",
)
@click.argument("source", required=False, shell_complete=_sources)
@click.option("--older-than", metavar="AGE", help='Only what was not used for this time: "7d", "12h", "30m".')
@click.option("-n", "--dry-run", is_flag=True, help="Only show what would be removed.")
@_yes
@_scheduler
@_directory
@_json
@_one_line_errors
def clear(
    source: str | None,
    older_than: str | None,
    dry_run: bool,
    yes: bool,
    scheduler: str | None,
    nodes: tuple[str, ...],
    directory: str | None,
    as_json: bool,
) -> None:
    """Remove what is cached: everything, one SOURCE, or what was not used for some time.

    The sources themselves are left alone, and running programs go on: they fetch again what they need.
    """
    if older_than is not None:
        _parsed_age("--older-than", older_than)
    if scheduler is not None:
        if not dry_run:
            where = f" on {', '.join(nodes)}" if nodes else " on each node"
            _confirm(f"remove {source or 'everything'} that is cached{where} of {scheduler}", yes=yes)
        wanted = {"older_than": older_than, "directory": directory, "dry_run": dry_run}
        _end(ok=_all_well(_on_nodes(scheduler, nodes, manage.clear, source, as_json=as_json, **wanted)))
        return
    # counted first, so that the question can name what would go
    if not dry_run and not yes:
        would = manage.clear(source, older_than=older_than, directory=directory, dry_run=True)
        if would.entries:
            whose = f" of {would.what}" if would.what else ""
            _confirm(
                f"remove {would.entries:,} entries{whose}, {shown_size(would.size)}, from {would.directory}", yes=yes
            )
    _print(manage.clear(source, older_than=older_than, directory=directory, dry_run=dry_run), as_json=as_json)


@cli.command(
    epilog="""\b
Examples:
  xzcache resize 50GB
  xzcache resize none --directory /scratch/cache
""",
    short_help="Change how much the cache may hold.",
    cls=OfSize,
)
@click.argument("size")
@_yes
@_scheduler
@_directory
@_json
@_one_line_errors
def resize(
    size: str, yes: bool, scheduler: str | None, nodes: tuple[str, ...], directory: str | None, as_json: bool
) -> None:
    """Change the bound of the cache to SIZE, such as 50GB or "512 MiB", for all processes; "none" is no bound.

    What does not fit any more is evicted at once, the least recently used first.
    """
    try:
        bound = None if size.lower() in ("none", "null") else parse_bound("SIZE", size)
    except ValueError:
        raise BadInput(f'SIZE {size!r} is not accepted: give "50GB", "500 MB" or, for no bound, "none"') from None
    if scheduler is not None:
        _confirm(f"change the bounds of the nodes of {scheduler} to {shown_bound(bound)}", yes=yes)
        _end(ok=_all_well(_on_nodes(scheduler, nodes, manage.resize, bound, directory, as_json=as_json)))
        return
    used = manage.info(directory).used
    if bound is not None and used > bound:
        _confirm(f"evict {shown_size(used - bound)} to come down to {shown_bound(bound)}", yes=yes)
    _print(manage.resize(bound, directory), as_json=as_json)


@cli.command(
    epilog="""\b
Examples:
  xzcache check
  xzcache check --repair
""",
    short_help="Compare the cache with its index and checksums.",
)
@click.option("--repair", is_flag=True, help="Remove damaged entries and leftovers, and correct the totals.")
@_scheduler
@_directory
@_json
@_one_line_errors
def check(repair: bool, scheduler: str | None, nodes: tuple[str, ...], directory: str | None, as_json: bool) -> None:
    """Read every entry and compare it with the index and its checksum, and look for leftovers of killed processes.

    Takes as long as reading the whole cache; other processes may go on using it. The exit code is 1 if anything is
    wrong and not repaired.
    """
    if scheduler is not None:
        _end(ok=_all_well(_on_nodes(scheduler, nodes, manage.check, directory, as_json=as_json, repair=repair)))
        return
    audit = manage.check(directory, repair=repair)
    if as_json:
        click.echo(json.dumps(_audited(audit), indent=2))
    else:
        click.echo(str(audit))
    _end(ok=audit.ok)


def _parsed_age(name: str, given: str) -> float:
    try:
        return manage.parse_since(name, given)
    except ValueError:
        raise BadInput(f'{name} {given!r} is not accepted: give "7d", "12h", "30m" or "90s"') from None


@cli.command(
    epilog="""\b
Examples:
  xzcache pin era5
  xzcache pin era5 t2m --for 7d
  xzcache pin                              what is pinned
""",
    short_help="Keep a source or an array: eviction passes over it.",
)
@click.argument("source", required=False, shell_complete=_sources)
@click.argument("array", required=False)
@click.option("--for", "duration", metavar="TIME", help='The time after which the pin ends: "7d", "12h", "30m".')
@_directory
@_json
@_one_line_errors
def pin(source: str | None, array: str | None, duration: str | None, directory: str | None, as_json: bool) -> None:
    """Pin SOURCE, or one ARRAY of it: what is cached of it, now and later, is passed over by eviction.

    Pins may take 80 % of the bound. Without SOURCE, the pins are listed.
    """
    seconds = None if duration is None else _parsed_age("--for", duration)
    if source is None:
        if seconds is not None:
            raise BadInput("--for is not accepted without SOURCE: give what is to be pinned")
        found = manage.pins(directory)
    else:
        found = manage.pin(source, array, duration=seconds, directory=directory)
    _print(found, as_json=as_json)


@cli.command(
    epilog="""\b
Examples:
  xzcache unpin era5
  xzcache unpin era5 t2m
  xzcache unpin --all
""",
    short_help="End a pin, or all.",
)
@click.argument("source", required=False, shell_complete=_sources)
@click.argument("array", required=False)
@click.option("--all", "everything", is_flag=True, help="End all pins.")
@_directory
@_json
@_one_line_errors
def unpin(source: str | None, array: str | None, everything: bool, directory: str | None, as_json: bool) -> None:
    """End the pin of SOURCE and of its arrays, or of one ARRAY. Nothing is removed from the cache."""
    if (source is None) != everything:
        raise BadInput("one of SOURCE and --all is accepted: give what is to be unpinned")
    count = manage.unpin(source, array, directory=directory)
    if as_json:
        click.echo(json.dumps({"unpinned": count, **manage.pins(directory).as_dict()}, indent=2))
    else:
        click.echo(f"{count} pin{'s' * (count != 1)} ended")


@cli.command(
    epilog="""\b
Examples:
  xzcache warm s3://bucket/era5.zarr --variable t2m --sel time=2020-01-01:2020-02-01
  xzcache warm era5.zarr --sel lat=60:40 --isel time=0:24 --dry-run
  xzcache warm s3://bucket/era5.zarr --storage-option anon=true --pin --for 7d
  xzcache warm s3://bucket/era5.zarr --scheduler tcp://10.0.0.1:8786 --every-node
\b
Exit codes: 0 all is cached, 1 some objects failed, 2 bad input, no access or no room, 130 interrupted.
After an interruption, the same command goes on with the rest.
""",
    short_help="Fetch what is missing of a dataset, before it is needed.",
)
@click.argument("source")
@click.option(
    "-v", "--variable", "variables", multiple=True, metavar="NAME", help="Only this variable; may be repeated."
)
@click.option("--sel", multiple=True, metavar="DIM=LABELS", help="Only these labels: one, a range A:B, or A,B,C.")
@click.option("--isel", multiple=True, metavar="DIM=POSITIONS", help="Only these positions, as 0:24.")
@click.option("--concurrency", default="32", metavar="N", show_default=True, help="Concurrent requests, of each node.")
@click.option(
    "--retries", default="3", metavar="N", show_default=True, help="How often failed objects are tried again."
)
@click.option(
    "-o", "--storage-option", "options", multiple=True, metavar="KEY=VALUE", help="For the client of the URL."
)
@click.option("--pin", "is_pinned", is_flag=True, help="Pin the source or, with --variable, these arrays as a whole.")
@click.option("--for", "duration", metavar="TIME", help='With --pin: the time after which the pin ends, as "7d".')
@click.option("--scheduler", metavar="ADDRESS", help="Warm the nodes of this Dask cluster, each with its share.")
@click.option("--every-node", is_flag=True, help="With --scheduler: warm all of it on each node.")
@click.option("-n", "--dry-run", is_flag=True, help="Only show what would be fetched, and whether it fits.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@_directory
@_json
@_one_line_errors
def warm(
    source: str,
    variables: tuple[str, ...],
    sel: tuple[str, ...],
    isel: tuple[str, ...],
    concurrency: str,
    retries: str,
    options: tuple[str, ...],
    is_pinned: bool,
    duration: str | None,
    scheduler: str | None,
    every_node: bool,
    dry_run: bool,
    quiet: bool,
    directory: str | None,
    as_json: bool,
) -> None:
    """Fetch what is missing of the dataset at SOURCE, a URL or path, into the cache, and no more."""
    if duration is not None and not is_pinned:
        raise BadInput("--for is not accepted without --pin")
    pin = is_pinned if duration is None else _parsed_age("--for", duration)
    if every_node and scheduler is None:
        raise BadInput("--every-node is not accepted without --scheduler: give the address of a Dask cluster")
    chosen: dict[str, Any] = {
        "concurrency": _whole("--concurrency", concurrency, 1),
        "retries": _whole("--retries", retries, 0),
        **({"storage_options": _storage_options(options)} if options else {}),
    }
    # not at the top: xarray takes long to import
    from xzcache.xarray import warm as warm_

    with _cluster(scheduler) as client:
        try:
            found = warm_(
                source,
                list(variables) or None,
                sel or None,
                isel=isel or None,
                client=client,
                every_node=every_node,
                pin=pin,
                # a bar would mix with the JSON of programs that read both streams
                progress=False if quiet or as_json else None,
                dry_run=dry_run,
                directory=directory,
                **chosen,
            )
        except KeyboardInterrupt:
            click.echo("xzcache: interrupted; what was fetched is cached, the same command fetches the rest", err=True)
            raise click.exceptions.Exit(_INTERRUPTED) from None
        except PermissionError as refused:
            if refused.errno is not None:
                # of a file
                raise
            raise BadInput(_as_options(str(refused))) from refused
    _print(found, as_json=as_json)
    _end(ok=found.ok)


def _as_options(text: str) -> str:
    """An error of the credentials, with the options of this command in place of Python's."""
    for python, here in _OPTIONS.items():
        text = text.replace(python, here)
    return text


_OPTIONS: Final = {
    'storage_options={"anon": True}': "-o anon=true",
    "else key and secret": "else -o key=... and -o secret=...",
    "in storage_options": "in -o",
}


def _whole(name: str, given: str, least: int) -> int:
    if not given.strip().isdecimal() or int(given) < least:
        raise BadInput(f"{name} {given!r} is not accepted: give a whole number, {least} or more")
    return int(given)


def _storage_options(given: tuple[str, ...]) -> dict[str, Any]:
    """Options as JSON values where they are such; their values are never shown, as they may be secrets."""
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise BadInput(f"--storage-option {key!r} without a value is not accepted: give KEY=VALUE")
        *folders, last = key.split(".")
        place = found
        for folder in folders:
            place = place.setdefault(folder, {})
        try:
            place[last] = json.loads(value)
        except ValueError:
            place[last] = value
    return found


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    if address is None:
        yield None
        return
    from distributed import Client

    make: Callable[..., Any] = Client
    try:
        client = make(address, timeout="10s", set_as_default=False)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"no scheduler answers at {address!r}: {' '.join(str(error).split())}") from None
    with client:
        yield client


@cli.command(
    epilog="""\b
Examples:
  xzcache report -o report.html
  xzcache report -o report.html --json
""",
    short_help="A page about the use of the cache, and how large it should be.",
)
@click.option("-o", "--output", metavar="FILE", default="xzcache-report.html", show_default=True, help="The page.")
@_directory
@_json
@_one_line_errors
def report(output: str, directory: str | None, as_json: bool) -> None:
    """Write a page of HTML about the use of the cache: by source and over time, hits, churn, saved time and bytes.

    It shows what part of the reads would be misses with a smaller or a larger bound. The page needs no network.
    """
    _print(manage.report(output, directory), as_json=as_json)


@cli.command(
    epilog="""\b
Examples:
  xzcache top
  xzcache top --once --seconds 5
  xzcache top --json
""",
    short_help="What is read at the moment, and by which processes.",
)
@click.option("--once", is_flag=True, help="Print one sample; so does a pipe.")
@click.option("--seconds", type=click.FloatRange(0.1, 3600), default=2.0, show_default=True, help="Between two looks.")
@_directory
@_json
@_one_line_errors
def top(once: bool, seconds: float, directory: str | None, as_json: bool) -> None:
    """Show the hit rate, the bytes a second from cache and sources, what is fetched, and the processes at work.

    "Fetching now" counts the objects that are being fetched; "fetched" names the arrays of which something was stored.
    In a terminal it goes on until Ctrl-C, over the last ten seconds. With --once, with --json and in a pipe it prints
    one sample of so many seconds.
    """
    meter = manage.Meter(directory, max(seconds, 10.0))
    found = meter.read()
    if once or as_json or not sys.stdout.isatty():
        if found.state == "ok":
            time.sleep(seconds)
            found = meter.read()
        _print(found, as_json=as_json)
        _end(ok=found.ok)
        return
    while True:
        click.clear()
        _print(found, as_json=False)
        try:
            time.sleep(seconds)
        except KeyboardInterrupt:
            return
        found = meter.read()


@cli.command(
    "serve-metrics",
    epilog="""\b
Examples:
  xzcache serve-metrics
  xzcache serve-metrics --port 9200 --directory /scratch/cache
""",
    short_help="Figures for Prometheus, on this machine only.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=9478, show_default=True, help="0 is any free one.")
@_directory
@_one_line_errors
def serve_metrics(port: int, directory: str | None) -> None:
    """Serve the figures of the cache at http://127.0.0.1:PORT/metrics, in the text format of Prometheus.

    They are those of all processes, and outlive them. Ends with Ctrl-C.
    """
    with manage.metrics_server(port, directory) as server:
        click.echo(f"http://127.0.0.1:{server.server_address[1]}/metrics")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


@cli.command(
    "config",
    epilog="""\b
Examples:
  xzcache config
  XZCACHE_MAX_SIZE=50GB xzcache config
""",
    short_help="Each setting, its value, and where it came from.",
)
@_directory
@_json
@_one_line_errors
def config_(directory: str | None, as_json: bool) -> None:
    """Show each setting, its value, and where it came from: the environment, a YAML file, Dask, or the default.

    The exit code is 1 if a name is configured that is no setting.
    """
    found = manage.settings(directory)
    _print(found, as_json=as_json)
    _end(ok=found.ok)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command and end the process with its exit code."""
    try:
        code = cli.main(arguments, prog_name="xzcache", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("xzcache: interrupted", err=True)
        code = 130
    except click.ClickException as error:
        click.echo(f"xzcache: {_one_line(error)}", err=True)
        code = error.exit_code
    except BrokenPipeError:
        # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(error: click.ClickException) -> str:
    text = " ".join(error.format_message().split())
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{text} (see {error.ctx.command_path} --help)"
    return text
