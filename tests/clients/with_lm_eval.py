"""lm-eval's class for completions: log-likelihoods of whole continuations, which need echo with logprobs."""

import os

from checks import MODEL, URL, check
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

model = LocalCompletionsAPI(
    model=MODEL,
    base_url=f"{URL}/v1/completions",
    tokenizer=os.environ["CAROUSEL_TOKENIZER"],
    tokenizer_backend="huggingface",
    num_concurrent=1,
    max_retries=1,
)
pairs = [("The capital of France is", " Paris"), ("The capital of France is", " a potato")]
asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
(likely, greedy), (unlikely, _) = model.loglikelihood(asked)
check("loglikelihood orders the answers", 0 > likely > unlikely, (likely, unlikely))
