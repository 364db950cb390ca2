"""What attach may raise. Nothing is raised into training after that.

ForeshockError
├── SettingsError (also ValueError)   an argument or environment variable is wrong
└── AttachError (also RuntimeError)   the ranks do not agree, or one of them never came
"""

from __future__ import annotations


class ForeshockError(Exception):
    """Everything that Foreshock raises on purpose."""


class SettingsError(ForeshockError, ValueError):
    """An argument or environment variable is wrong; the message names it and the way out."""


class AttachError(ForeshockError, RuntimeError):
    """The ranks could not attach together; the message names the ranks and why."""
