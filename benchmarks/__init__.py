"""Measurements: everything the README and docs/ show is printed or drawn by a command in here."""
