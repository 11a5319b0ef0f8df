"""What pydantic finds wrong, in sentences for those who wrote it: clients, and users of the command line."""

from __future__ import annotations

from pydantic_core import ErrorDetails


def sentence(problem: ErrorDetails, field: str) -> str:
    """One of pydantic's findings as a sentence about the field or flag at fault."""
    match problem["type"]:
        case "missing":
            return f"{field} is required"
        case "extra_forbidden":
            return f"{field} is not known here"
        case "json_invalid":
            return f"the request body is not valid JSON: {problem['ctx']['error']}"
        case "model_attributes_type" | "model_type" if not field:
            return "the request body must be a JSON object"
        case "value_error":
            return str(problem["ctx"]["error"])
        case "byte_size" | "byte_size_unit":
            expected = "should be a size like 2GiB or 800MB"
        case _:
            expected = problem["msg"].removeprefix("Input ").partition(", unable")[0]
    given = repr(problem["input"])
    return f"{field} {expected}" + (f", got {given}" if len(given) <= 40 else "")


def printable(text: str) -> str:
    """With a mark in place of bytes that were no text, which JSON cannot have."""
    return text.encode(errors="replace").decode()


def count_of(text: str, most: int) -> int | None:
    """The number from 1 to `most` that a client has written, if it is one."""
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(most))):
        return None
    return count if 1 <= (count := int(text)) <= most else None


def place(problem: ErrorDetails) -> str:
    """Where the problem is, as one would write it: messages[0].content."""
    path = ""
    for step in problem["loc"]:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path
