"""LangChain: invoke, stream, bound tools, and structured output by each method."""

from checks import ASK, MODEL, TOOLS_MODEL, TOOLS_URL, URL, check
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"{city}: sunny"


chat = ChatOpenAI(base_url=f"{URL}/v1", api_key="none", model=MODEL, max_tokens=20, temperature=0, max_retries=0)
whole = chat.invoke("Name three rivers.").content
check("invoke", whole)
check("stream is the same text", "".join(chunk.content for chunk in chat.stream("Name three rivers.")) == whole)
able = ChatOpenAI(
    base_url=f"{TOOLS_URL}/v1", api_key="none", model=TOOLS_MODEL, max_tokens=120, temperature=0, max_retries=0
)
called = able.bind_tools([get_weather], tool_choice="any").invoke(ASK)
check("bind_tools", called.tool_calls and called.tool_calls[0]["name"] == "get_weather", called)
for method in ("json_schema", "function_calling"):
    person = able.with_structured_output(Person, method=method).invoke("Ada is 36 years old.")
    check(f"with_structured_output, {method}", isinstance(person, Person), person)
