"""Settings of the collector: flags, else FORESHOCK_COLLECTOR_* variables, else a TOML file, else defaults."""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import os
import re
import socket
import tomllib
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

from foreshock_collector.analysis.rules import DEFAULT, Rules
from foreshock_collector.log_format import FORMATS
from foreshock_collector.notify.message import FORMATS as NOTIFY_FORMATS
from foreshock_collector.settings import doc_of, setting
from foreshock_protos import DEFAULT_GRPC_PORT, DEFAULT_HTTP_PORT

_PREFIX = "FORESHOCK_COLLECTOR_"
_MOST_ACK_SECONDS = 5.0
"""Recorders report as often; `ingest.flow` knows no longer interval either."""
LEAST_SERIES = 1000
"""More than any run has beside those of its ranks, which are some 300."""
_ANY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104 - compared, not listened on


class ConfigError(ValueError):
    """A setting is wrong. The text names the setting and says what is accepted."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Holds the settings of a collector."""

    host: str = setting("127.0.0.1", "Address to listen on, for gRPC and HTTP.")
    grpc_port: int = setting(DEFAULT_GRPC_PORT, "Port for recorders; 0 takes a free one.")
    http_port: int = setting(DEFAULT_HTTP_PORT, "Port for the page, the API and /metrics; 0 takes a free one.")
    public_url: str = setting(
        "",
        "Address of the page that ranks print; default: this machine's name, if others may connect.",
    )
    database: str = setting("foreshock.db", "SQLite file for runs, steps and incidents.")
    ack_seconds: float = setting(
        1.0,
        "Seconds between commits, acknowledgements and the recorders' flushes; at most 5. While the collector is busy, "
        "they become longer, up to 5.",
    )
    retention_seconds: float = setting(900.0, "Seconds for which the series of an ended run stay.")
    most_runs: int = setting(
        1000,
        "Runs that report or ended within --retention-seconds; one machine may have half of them. More are refused.",
    )
    run_series: int = setting(
        20_000,
        "Series of one run on /metrics. If it would have more, only its first ranks have series of their own, and 16 "
        "that stand out.",
    )
    history_days: float = setting(28.0, "Days for which the steps of an ended run are kept; its incidents stay.")
    database_gigabytes: float = setting(
        4.0, "Size of the database above which the oldest steps are deleted, whatever their age."
    )
    silent_seconds: float = setting(900.0, "Seconds without a report after which a run counts as ended.")
    metrics_cache_seconds: float = setting(
        1.0, "Seconds for which scrapes share one rendering of /metrics; 0 renders each time."
    )
    otlp_endpoint: str = setting(
        "",
        "URL of an OpenTelemetry receiver that gets the series of /metrics over OTLP/HTTP every 15 seconds, such as "
        "http://localhost:4318/v1/metrics; needs `pip install 'foreshock[otlp]'`.",
    )
    tokens: str = setting(
        "", "File of the tokens that may write and read (docs/security.md); default: none is asked for."
    )
    tls_certificate: str = setting("", "File of the certificate for gRPC and HTTP, in PEM; default: no TLS.")
    tls_key: str = setting("", "File of its private key.")
    tls_client_ca: str = setting("", "File of the certificates that sign those of recorders; each must then show one.")
    allow_unauthenticated: bool = setting(
        False, "Listen on other than loopback addresses, where anyone may read and write."
    )
    notify_url: str = setting("", "Webhook to notify about runs in trouble (docs/notifications.md); default: none.")
    notify_format: str = setting(
        NOTIFY_FORMATS[0], "Form of these messages: alertmanager, or slack or teams for these services' own webhooks."
    )
    notify_secret: str = setting("", "File of the secret that signs these messages; default: they are not signed.")
    ready_file: str = setting("", "File to write the chosen ports to, as JSON, once they are listened on.")
    log_format: str = setting("text", "Form of the log on standard error: text, or json for one object a line.")

    runs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Rules of detection by pattern of run names, such as "llm-*". Only the file can set them."""

    def rules_of(self, run: str) -> Rules:
        """Return the rules for a run: the defaults, overridden by every matching pattern in the order of the file."""
        rules = DEFAULT
        for pattern, overrides in self.runs.items():
            if fnmatchcase(run, pattern):
                rules = rules.with_overrides(overrides)
        return rules

    def __post_init__(self) -> None:
        for name in ("grpc_port", "http_port"):
            if not 0 <= getattr(self, name) < 65536:
                raise ConfigError(f"{_flag(name)} must be 0 to 65535, not {getattr(self, name)}")
        for name in ("ack_seconds", "retention_seconds", "silent_seconds"):
            if not 0 < getattr(self, name) < 1e7:
                raise ConfigError(f"{_flag(name)} must be a positive number of seconds, not {getattr(self, name):g}")
        for name in ("most_runs", "history_days", "database_gigabytes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{_flag(name)} must be more than 0, not {getattr(self, name):g}")
        if self.run_series < LEAST_SERIES:
            least = f"at least {LEAST_SERIES}, not {self.run_series}"
            raise ConfigError(f"--run-series must be {least}: a run has some hundred beside those of its ranks")
        if self.ack_seconds > _MOST_ACK_SECONDS:
            most = f"at most {_MOST_ACK_SECONDS:g}, not {self.ack_seconds:g}"
            raise ConfigError(f"--ack-seconds must be {most}: ranks that report less often look dead")
        if not 0 <= self.metrics_cache_seconds < 1e7:
            raise ConfigError(f"--metrics-cache-seconds must be 0 or more, not {self.metrics_cache_seconds:g}")
        if self.otlp_endpoint and not re.fullmatch(r"https?://[^\s/].*", self.otlp_endpoint):
            raise ConfigError(f"--otlp-endpoint must be an http:// or https:// URL, not {self.otlp_endpoint!r}")
        for name in ("host", "database"):
            if not getattr(self, name):
                raise ConfigError(f"{_flag(name)} must not be empty")
        if self.log_format not in FORMATS:
            raise ConfigError(f"--log-format must be {' or '.join(FORMATS)}, not {self.log_format!r}")
        if self.notify_url and not is_web_address(self.notify_url):
            # The address may hold a secret: it is not repeated.
            raise ConfigError("--notify-url must be an address that begins with http:// or https://")
        if self.notify_format not in NOTIFY_FORMATS:
            raise ConfigError(f"--notify-format must be {' or '.join(NOTIFY_FORMATS)}, not {self.notify_format!r}")
        if self.notify_secret and not self.notify_url:
            raise ConfigError("--notify-secret requires --notify-url")
        for pattern, overrides in self.runs.items():
            try:
                DEFAULT.with_overrides(overrides)
            except ValueError as error:
                raise ConfigError(f"runs.{pattern}: {error}") from error
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ConfigError("--tls-certificate and --tls-key require each other")
        if self.tls_client_ca and not self.tls_certificate:
            raise ConfigError("--tls-client-ca requires --tls-certificate and --tls-key")
        if not (is_loopback(self.host) or self.tokens or self.allow_unauthenticated):
            raise ConfigError(
                f"--host {self.host} lets anyone on the network read and write: set --tokens, or add "
                "--allow-unauthenticated to allow it"
            )


class Parser(argparse.ArgumentParser):
    """Parses arguments, and raises `ConfigError` for a wrong one instead of printing usage."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise ConfigError(f"{message}; see --help")


def config_from(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Config:
    """Return the settings from arguments, environment and file. Raises `ConfigError`."""
    env = os.environ if environment is None else environment
    parser = Parser(
        prog="foreshock collector",
        description="Receive step records, detect and diagnose failures, export Prometheus series.",
        usage="%(prog)s [OPTIONS]",
        epilog=f"Each setting may also be given as {_PREFIX}NAME in the environment, or in the file of --config.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="X", help="TOML file with these settings, named like the flags")
    for each in _flagged():
        doc = doc_of(each).rstrip(".").replace("%", "%%")
        if each.type == "bool":
            parser.add_argument(_flag(each.name), action="store_const", const="true", help=doc)
        else:
            parser.add_argument(_flag(each.name), metavar="X", help=f"{doc} (default: {each.default or 'none'})")
    options = vars(parser.parse_args(arguments))
    file = options["config"] or env.get(_PREFIX + "CONFIG")
    values: dict[str, Any] = _from_file(Path(file)) if file else {}
    for each in _flagged():
        name = each.name
        if (text := options[name] if options[name] is not None else env.get(_PREFIX + name.upper())) is not None:
            values[name] = _parse(_flag(name), str(each.type), text)
    return Config(**values)


def misspelled_variables(environment: Iterable[str]) -> list[str]:
    """Return a warning for each variable whose name is nearly that of a setting.

    Other unknown names are left alone: Kubernetes sets some for a service called foreshock-collector.
    """
    known = ["CONFIG", *(each.name.upper() for each in _flagged())]
    lines = []
    for name in sorted(environment):
        suffix = name.removeprefix(_PREFIX)
        near = difflib.get_close_matches(suffix, known, n=1, cutoff=0.75)
        if name.startswith(_PREFIX) and near and suffix not in known:
            lines.append(f"{name} is not a setting and is ignored; did you mean {_PREFIX}{near[0]}?")
    return lines


def _flagged() -> list[Field[Any]]:
    """Return the fields that hold one value each."""
    return [each for each in fields(Config) if each.name != "runs"]


def _from_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, RecursionError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    runs = values.pop("runs", {})
    if not isinstance(runs, dict) or not all(isinstance(overrides, dict) for overrides in runs.values()):
        raise ConfigError(f'--config {path}: runs must be tables by run: [runs."llm-*"]')
    known = {each.name: str(each.type) for each in _flagged()}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"--config {path}: unknown setting {name!r}; known are {', '.join((*known, 'runs'))}")
        values[name] = _parse(f"{path}: {name}", known[name], str(value))
    return values | {"runs": runs}


def _parse(name: str, kind: str, text: str) -> Any:
    try:
        if kind == "bool":
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return {"int": int, "float": float, "str": str}[kind](text)
    except (KeyError, ValueError):
        wanted = {"bool": "true or false", "int": "a whole number", "float": "a number"}[kind]
        raise ConfigError(f"{name} must be {wanted}, not {text!r}") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def is_web_address(text: str) -> bool:
    """Return whether a text is an HTTP address with a host."""
    try:
        parts = urllib.parse.urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def secret_from(path: str) -> bytes | None:
    """Return the secret in a file, without white space around it; None without a file. Raises `ConfigError`."""
    if not path:
        return None
    try:
        secret = Path(path).read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"--notify-secret {path} cannot be read: {error.strerror}") from error
    if not secret:
        raise ConfigError(f"--notify-secret {path} is empty")
    return secret


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def public_host(host: str) -> str:
    """Return the name under which others reach this machine: nobody can connect to 0.0.0.0."""
    return socket.gethostname() if host in _ANY_ADDRESS else host


def address_of(host: str, port: int) -> str:
    """Return host:port."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
