"""instructor in each of its modes."""

import instructor
from checks import TOOLS_MODEL, TOOLS_URL, check
from openai import OpenAI
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(base_url=f"{TOOLS_URL}/v1", api_key="none", max_retries=0), mode=mode)
    person = client.chat.completions.create(
        model=TOOLS_MODEL,
        response_model=Person,
        messages=[{"role": "user", "content": "Ada is 36."}],
        temperature=0,
        max_tokens=120,
        max_retries=0,
    )
    check(mode.name, isinstance(person, Person), person)
