"""DSPy: a signature, answered by its adapter for chats."""

import dspy
from checks import TOOLS_MODEL, TOOLS_URL, check

dspy.configure(
    lm=dspy.LM(
        f"openai/{TOOLS_MODEL}",
        api_base=f"{TOOLS_URL}/v1",
        api_key="none",
        temperature=0,
        max_tokens=200,
        cache=False,
        num_retries=0,
    )
)
answer = dspy.Predict("question -> answer")(question="What is the capital of France?").answer
check("Predict", "Paris" in answer, answer)
