"""What a request says of the form of its answer, in OpenAI's words or in vLLM's, and the grammar that it asks
for."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from pydantic import ConfigDict, Field

from scheduler.core.request import InvalidRequestError
from scheduler.core.sampling import GrammarKind, GrammarSpec
from server.api.fields import OBJECT, TEXT, TEXT_OR_OBJECT, CheckedBody, Hint, ShortText, described

Schema = dict[str, Any] | bool
SchemaText = Annotated[str | Schema, described("a JSON schema, or the text of one")]
Choices = Annotated[list[str], Field(min_length=1, fail_fast=True)]


class JsonSchemaFormat(CheckedBody):
    model_config = ConfigDict(populate_by_name=True)

    name: Hint[str] = ""
    description: Hint[str] = ""
    schema_: Annotated[Schema, Field(alias="schema")] = {}
    """The schema."""
    strict: bool = False
    """Refuse keywords that cannot be enforced; without it they are ignored."""


class ResponseFormat(CheckedBody):
    """OpenAI's."""

    model_config = ConfigDict(populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"]
    """What the answer is."""
    json_schema: JsonSchemaFormat | None = None
    """The schema that it follows."""
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    """The schema itself, as llama.cpp and others have it, also beside `json_object`."""


class StructuredOutputs(CheckedBody):
    """vLLM's; only one of them may be given."""

    json_: Annotated[SchemaText | None, Field(alias="json")] = None
    """A JSON schema that the answer follows."""
    regex: str | None = None
    """A regular expression that the whole answer matches."""
    choice: Choices | None = None
    """Texts of which the answer is one."""
    grammar: str | None = None
    """A context-free grammar of the answer, in Lark's notation or in GBNF."""
    json_object: bool = False
    """The answer is a JSON object."""
    disable_any_whitespace: bool = False
    """No white space between the parts of JSON."""
    disable_additional_properties: bool = False
    """An object that names properties, and says nothing of others, has no others."""
    whitespace_pattern: ShortText | None = None
    """What may stand between the parts of JSON, as a regular expression."""


class Form(NamedTuple):
    """A grammar that was asked for, and the field that did."""

    grammar: GrammarSpec
    field: str
    is_needed: bool = True
    """Otherwise an answer goes without it where it cannot be served."""


class StructuredFields(CheckedBody):
    """Of the endpoints whose answers may be held to a form."""

    response_format: Annotated[ResponseFormat | None, OBJECT] = None
    """JSON, or JSON that a schema accepts."""
    structured_outputs: Annotated[StructuredOutputs | None, OBJECT] = None
    """The form of the answer in vLLM's words."""
    guided_json: Annotated[SchemaText | None, TEXT_OR_OBJECT] = None
    """A JSON schema that the answer follows, as an older vLLM has it."""
    guided_regex: str | None = None
    """A regular expression that the whole answer matches."""
    guided_choice: Choices | None = None
    """Texts of which the answer is one."""
    guided_grammar: Annotated[str | None, TEXT] = None
    """A context-free grammar of the answer, in Lark's notation or in GBNF."""
    guided_decoding_backend: Hint[str] = ""
    guided_whitespace_pattern: ShortText | None = None
    """What may stand between the parts of JSON, as a regular expression."""

    def form(self) -> Form | None:
        """Raises `InvalidRequestError` where more than one is asked for."""
        forms = [*self._own(), *self._vllm(), *self._older()]
        if len(forms) > 1:
            raise InvalidRequestError(
                f"{forms[1].field} and {forms[0].field} both say what the answer looks like: give one of them",
                forms[1].field,
            )
        return self._as_json(forms[0]) if forms else None

    def _as_json(self, form: Form) -> Form:
        """With what is said of how JSON is written, which other forms have no use for."""
        if not form.grammar.is_json:
            return form
        options = self.structured_outputs or StructuredOutputs()
        whitespace = options.whitespace_pattern or self.guided_whitespace_pattern
        grammar = msgspec.structs.replace(
            form.grammar,
            whitespace="" if options.disable_any_whitespace else whitespace,
            closed=options.disable_additional_properties,
        )
        return form._replace(grammar=grammar)

    def _own(self) -> list[Form]:
        """In the words of the endpoint's own API."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return []
        if wanted.type == "json_schema" and wanted.json_schema is not None:
            schema = wanted.json_schema
            spec = GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(schema.schema_), schema.strict)
        elif wanted.schema_ is not None:
            spec = GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(wanted.schema_), strict=False)
        elif wanted.type == "json_object":
            spec = GrammarSpec(GrammarKind.JSON_OBJECT)
        else:
            raise InvalidRequestError("response_format of type json_schema needs json_schema", "response_format")
        return [Form(spec, "response_format")]

    def _vllm(self) -> list[Form]:
        wanted = self.structured_outputs
        if wanted is None:
            return []
        found = forms_of(wanted.json_, wanted.regex, wanted.choice, wanted.grammar)
        if wanted.json_object:
            found.append(GrammarSpec(GrammarKind.JSON_OBJECT))
        return [Form(spec, "structured_outputs") for spec in found]

    def _older(self) -> list[Form]:
        wanted = (self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        names = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
        given = [name for name, value in zip(names, wanted, strict=True) if value is not None]
        return [Form(spec, name) for spec, name in zip(forms_of(*wanted), given, strict=True)]


def forms_of(
    schema: str | Schema | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> list[GrammarSpec]:
    """A spec for each that is given."""
    specs = []
    if schema is not None:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        specs.append(GrammarSpec(GrammarKind.JSON_SCHEMA, text, strict=False))
    if regex is not None:
        specs.append(GrammarSpec(GrammarKind.REGEX, regex))
    if choice is not None:
        specs.append(GrammarSpec(GrammarKind.CHOICE, json.dumps(choice)))
    if grammar is not None:
        specs.append(GrammarSpec(GrammarKind.LARK, grammar))
    return specs
