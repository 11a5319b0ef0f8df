"""pydantic-ai: text, an output type by tool and by schema, and a tool that is run."""

from checks import MODEL, TOOLS_MODEL, TOOLS_URL, URL, check
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Person(BaseModel):
    name: str
    age: int


settings = {"temperature": 0.0, "max_tokens": 120}
small = OpenAIProvider(base_url=f"{URL}/v1", api_key="none")
able = OpenAIProvider(base_url=f"{TOOLS_URL}/v1", api_key="none")
for kind in (OpenAIChatModel, OpenAIResponsesModel):
    name = kind.__name__
    text = Agent(kind(MODEL, provider=small), model_settings=settings).run_sync("Name a river.").output
    check(f"{name}: text", text, text)
    model = kind(TOOLS_MODEL, provider=able)
    for how, output in (("tool", Person), ("schema", NativeOutput(Person))):
        person = Agent(model, output_type=output, model_settings=settings).run_sync("Ada is 36.").output
        check(f"{name}: output_type by {how}", isinstance(person, Person), person)
