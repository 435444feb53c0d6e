"""Words for people, and for the shells that they copy commands into."""

import sys

import pytest

from phitune.text import command_line


def test_a_command_can_be_pasted_into_a_shell() -> None:
    line = command_line("ask", "my run", "What's that?")
    assert line == "phitune ask 'my run' 'What'\"'\"'s that?'"


def test_on_windows_paths_stand_as_they_are_and_quotes_are_double(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """cmd.exe takes single quotes for letters."""
    monkeypatch.setattr(sys, "platform", "win32")
    line = command_line("ask", r"C:\Users\me\my run", r"C:\runs\a", 'What is "that"?')
    assert line == r'''phitune ask "C:\Users\me\my run" C:\runs\a "What is \"that\"?"'''
