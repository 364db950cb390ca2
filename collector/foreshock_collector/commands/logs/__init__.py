"""Reads recorded training logs: bytes become rows, rows become columns, and columns are replayed.

`names` finds columns by meaning, `formats` decides which reader claims a file, and each other module reads one family
of formats into chunks, which `columns` collects.
"""

from foreshock_collector.commands.logs.columns import Log, LogError, Row
from foreshock_collector.commands.logs.formats import find_logs, read_log
from foreshock_collector.commands.logs.names import parse_columns

__all__ = ["Log", "LogError", "Row", "find_logs", "parse_columns", "read_log"]
