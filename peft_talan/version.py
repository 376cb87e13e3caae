"""The one place where the version stands, and how this version is installed."""

__version__ = "0.1.0"

INSTALL = "pip install ./peft_talan"
"""The folder is a clone of the repository: there is no release yet. Model cards and docs/index.md say it."""
