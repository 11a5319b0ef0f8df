"""The shape of a body: which fields it has, how long they are, and how many items its lists have.

It is looked at before pydantic builds anything, in a pass over the bytes that ends at the first thing wrong: what
pydantic reads, and words the errors of, is never much then. Only what is asked may be long.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import islice

import msgspec
from msgspec import Raw

from scheduler.core.request import InvalidRequestError
from scheduler.fitting import PromptTooLongError
from server.api.chat_request import CONTENT, ChatRequest, Message, Part
from server.api.completion_request import MAX_SEQUENCES, PROMPTS, CompletionRequest
from server.api.embedding_request import EmbeddingRequest
from server.api.fields import LIST, TEXT, Body, long_fields
from server.api.reading import MAX_NAMED, check_name, names_of

MAX_FIELD_BYTES = 64 * 1024
"""Of every field but the prompt, the messages and what they say."""

MAX_MARKS = 256
"""Of JSON, in a part of a message that may be long."""

_FIRST_ITEM = re.compile(rb"\s*\[\s*(.)", re.DOTALL)


def check_completion(
    body: bytes, model: type[CompletionRequest] = CompletionRequest, *, longest: int, max_tokens: int
) -> None:
    """Raise `InvalidRequestError` for a body of /v1/completions that cannot be right. `longest`: tokens that a
    prompt plus answer can have; `max_tokens`: tokens that all prompts may have together."""
    fields = _body(body, model)
    _check_prompts(fields, "prompt", longest, max_tokens)


def check_embedding(
    body: bytes, model: type[EmbeddingRequest] = EmbeddingRequest, *, longest: int, max_tokens: int
) -> None:
    """The same for a body of /v1/embeddings."""
    _check_prompts(_body(body, model), "input", longest, max_tokens)


def _check_prompts(fields: Mapping[str, Raw], field: str, longest: int, max_tokens: int) -> None:
    prompt = fields.get(field)
    if prompt is None or (first := _FIRST_ITEM.match(prompt)) is None:
        return
    num_commas = bytes(prompt).count(b",")
    if first[1] not in (TEXT.begins, LIST.begins):
        if num_commas + 1 >= longest:
            raise PromptTooLongError(
                f"the {field} has {num_commas + 1} tokens, and a sequence can have {longest} at most: shorten it",
                num_commas + 1,
                longest,
            )
        return
    is_same = _is_text if first[1] == TEXT.begins else _is_flat_list
    if not all(map(is_same, _items(prompt, field, MAX_SEQUENCES))):
        raise InvalidRequestError(f"{field} should be {PROMPTS}", field)
    if first[1] == LIST.begins and num_commas >= max_tokens:
        raise InvalidRequestError(
            f"the {field} has {num_commas + 1} tokens, and {max_tokens} may wait at a time: send fewer at once",
            field,
        )


def check_fields(body: bytes, model: type[Body], longest: int) -> None:
    """Raise `InvalidRequestError` for a body of another endpoint that cannot be right. Lists of turns, items or
    tokens that may be long have no more than `longest`."""
    fields = _body(body, model)
    for name in long_fields(model):
        value = fields.get(name)
        if value is not None and bytes(value).startswith(LIST.begins):
            _items(value, name, longest)


def check_chat(body: bytes, *, longest: int) -> None:
    """Raise `InvalidRequestError` for a body of /v1/chat/completions that cannot be right. `longest`: tokens that
    prompt plus answer can have."""
    messages = _body(body, ChatRequest).get("messages")
    if messages is None:
        return
    for place, message in enumerate(_items(messages, "messages", longest)):
        path = f"messages[{place}]"
        fields = _fields(message, Message, path)
        _check_rest(message, [fields[name] for name in long_fields(Message) if name in fields], path)
        content = fields.get("content")
        if content is None or _is_text(content):
            continue
        for part in _items(content, f"{path}.content", longest):
            try:
                if not (_is_text(part) or _is_simple(part)):
                    _check_rest(part, [_fields(part, Part, "").get("text", Raw())], path)
            except InvalidRequestError:
                raise InvalidRequestError(
                    f"{path}.content should be {CONTENT}: this model reads text only", f"{path}.content"
                ) from None


def _is_simple(part: Raw) -> bool:
    """Whether it has few fields, however long: an image, say, which nobody reads."""
    content = bytes(part)
    return sum(map(content.count, (b'"', b",", b"[", b"{"))) <= MAX_MARKS


def _check_rest(whole: Raw, long: Iterable[Raw], path: str) -> None:
    """What is not looked at has a bound too."""
    if len(whole) - sum(map(len, long)) > MAX_FIELD_BYTES:
        raise InvalidRequestError(f"{path} is longer than {MAX_FIELD_BYTES // 1024} KiB besides its text", path)


@cache
def _decoder(model: type[Body]) -> msgspec.json.Decoder[msgspec.Struct]:
    """Finds the fields of a model's JSON object."""
    fields = [(name, Raw, Raw()) for name in names_of(model) if name.isidentifier()]
    return msgspec.json.Decoder(msgspec.defstruct(model.__name__, fields))


_OBJECTS = msgspec.json.Decoder(dict[str, Raw])
_ITEMS = msgspec.json.Decoder(list[Raw])


def _body(body: bytes, model: type[Body]) -> dict[str, Raw]:
    """The fields of a whole body. Raises `InvalidRequestError` for misspelt ones, and for too many others."""
    fields = _fields(body, model, "")
    if len(body) - sum(map(len, fields.values())) > MAX_FIELD_BYTES:
        raise InvalidRequestError(
            f"the request body has more than {MAX_FIELD_BYTES // 1024} KiB of fields that are not known here"
        )
    try:
        unknown = _OBJECTS.decode(body).keys() - names_of(model)
    except msgspec.ValidationError:  # pydantic says more of it
        return fields
    except UnicodeDecodeError as error:
        raise _no_json(error) from None
    for name in islice(sorted(unknown), MAX_NAMED):
        check_name(model, name, name)
    return fields


def _no_json(error: Exception) -> InvalidRequestError:
    reason = str(error).removeprefix("JSON is malformed: ")
    return InvalidRequestError(f"the request body is not valid JSON: {reason}")


def _fields(raw: bytes | Raw, model: type[Body], path: str) -> dict[str, Raw]:
    """The fields that an object has, if it is one."""
    try:
        found = msgspec.structs.asdict(_decoder(model).decode(raw))
    except msgspec.ValidationError:
        if len(raw) > MAX_FIELD_BYTES:
            raise InvalidRequestError(
                f"{path or 'the request body'} must be a JSON object", path or None
            ) from None
        return {}  # pydantic says more of it
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _no_json(error) from None
    fields = {name: value for name, value in found.items() if len(value)}
    long = long_fields(model)
    for name, value in fields.items():
        if len(value) > MAX_FIELD_BYTES and not (name in long and bytes(value)[0] in long[name]):
            place = _join(path, name)
            raise InvalidRequestError(f"{place} is longer than {MAX_FIELD_BYTES // 1024} KiB", place)
    return fields


def _items(raw: Raw, path: str, bound: int) -> list[Raw]:
    """The items of a JSON list; none if it is no list. Raises `InvalidRequestError` for more than `bound`."""
    try:
        items = _ITEMS.decode(raw)
    except msgspec.ValidationError:
        return []
    if len(items) > bound:
        raise InvalidRequestError(f"{path} has {len(items)} items, and can have {bound} at most", path)
    return items


def _is_text(raw: Raw) -> bool:
    return bytes(raw).startswith(TEXT.begins)


def _is_flat_list(raw: Raw) -> bool:
    """Whether it is a list of no lists, objects or strings."""
    content = bytes(raw)
    return content.startswith(LIST.begins) and not any(opening in content[1:] for opening in (b"[", b"{", b'"'))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
