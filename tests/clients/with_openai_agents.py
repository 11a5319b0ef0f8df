"""OpenAI's agents: by responses, their default, and by chat, with a tool that is run."""

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from checks import ASK, TOOLS_MODEL, TOOLS_URL, check
from openai import AsyncOpenAI

set_tracing_disabled(True)
cities: list[str] = []


@function_tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    cities.append(city)
    return "21 degrees and sunny"


client = AsyncOpenAI(base_url=f"{TOOLS_URL}/v1", api_key="none", max_retries=0)
for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
    cities.clear()
    agent = Agent(
        name="Weather",
        model=kind(TOOLS_MODEL, client),
        tools=[get_weather],
        model_settings=ModelSettings(
            temperature=0, max_tokens=80, tool_choice="required", parallel_tool_calls=False
        ),
    )
    # What so small a model makes of the result is its own: it may call again, and in the end say nothing.
    answer = Runner.run_sync(agent, ASK).final_output
    check(f"{kind.__name__}: the tool was run, and the run came to its end", cities and answer is not None, cities)
