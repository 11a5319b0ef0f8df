"""What the fields of requests are made of: bounds, and sentences about what is wrong with them.

Null means "not given", as in OpenAI's API. A parameter of somebody's API that Carousel does not implement is
accepted where it asks for nothing and refused where it would change the answer: none is silently ignored.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MAX_STOPS = 16
MAX_BAD_WORDS = 128
MAX_STOP_CHARACTERS = 256
"""Of one stop string, or of one bad word."""


SAID = "said"
"""The type of an error whose sentence is told as it is."""


def described(expected: str) -> WrapValidator:
    """One sentence about a union, in place of one for each of its members; unless a part of it has a sentence of
    its own."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            for problem in error.errors(include_url=False):
                if problem["type"] == SAID:
                    raise PydanticCustomError(SAID, "{said}", {"said": problem["msg"]}) from None
                if problem["type"] == "union":  # of an item
                    raise PydanticCustomError(SAID, "{said}", {"said": f"has one that {problem['msg']}"}) from None
            raise PydanticCustomError("union", "should be {expected}", {"expected": expected}) from None

    return WrapValidator(validate)


class Only:
    """Marks a parameter that is not implemented."""

    def __init__(self, *neutral: Any) -> None:
        self.neutral = neutral
        """The values that ask for nothing."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: Any) -> Any:
        if value not in self.neutral:
            raise PydanticCustomError("not_implemented", "is not implemented by Carousel")
        return value


def only(*neutral: Any) -> Only:
    """For a parameter that is not implemented: refuse every value that asks for something."""
    return Only(*neutral)


def _above_zero(length: int) -> int:
    if length == 0:
        raise PydanticCustomError("length", "should be 1 or more, or -1 for as many as there is room for")
    return length


class Long:
    """Marks a field that may be long, and says what its JSON begins with then."""

    def __init__(self, begins: bytes) -> None:
        self.begins = begins


TEXT, LIST, OBJECT = Long(b'"'), Long(b"["), Long(b"{")
TEXT_OR_LIST, TEXT_OR_OBJECT = Long(b'"['), Long(b'"{')


class NoEffect:
    """Marks a field that is accepted and changes nothing in the answer."""


T = TypeVar("T")
Hint = Annotated[T, NoEffect()]
"""For a parameter that says something which other servers have a use for."""

Count = Annotated[int, Field(ge=0, lt=2**31)]
Length = Annotated[int, Field(ge=-1, lt=2**31)]
"""Tokens; -1 is as many as there is room for."""
LengthAboveZero = Annotated[Length, AfterValidator(_above_zero)]
TokenIds = Annotated[list[Count], Field(fail_fast=True)]
ShortText = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]


class Body(BaseModel):
    """A JSON object of a request, without its nulls. What it has besides its fields is left out, and named to who
    sent it (`server.api.reading`): programs put keys of their own everywhere."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, use_attribute_docstrings=True)

    synonyms: ClassVar[dict[str, str]] = {}
    """Other servers' names, which `_translated` knows, and the fields here that they mean."""

    @model_validator(mode="before")
    @classmethod
    def _in_our_words(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return cls._translated({name: value for name, value in values.items() if value is not None})

    @classmethod
    def _translated(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields by their names here."""
        return values


class CheckedBody(Body):
    """One whose keys are an API's own: a key that is nearly one of its fields is a misspelt one, and refused."""


@cache
def long_fields(model: type[Body]) -> dict[str, bytes]:
    """The names of a model's fields that may be long, and what each begins with then."""
    return {
        info.alias or name: mark.begins
        for name, info in model.model_fields.items()
        for mark in info.metadata
        if isinstance(mark, Long)
    }
