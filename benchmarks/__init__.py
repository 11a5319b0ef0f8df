"""Measurements: everything the README shows is printed or drawn by a command in here."""
