"""LlamaIndex's OpenAILike: complete, chat, stream."""

from checks import MODEL, URL, check
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

model = OpenAILike(
    model=MODEL,
    api_base=f"{URL}/v1",
    api_key="none",
    is_chat_model=True,
    max_tokens=12,
    temperature=0,
    max_retries=0,
)
turns = [ChatMessage(role="user", content="Name three rivers.")]
whole = model.chat(turns).message.content
check("chat", whole)
check("stream_chat is the same text", "".join(part.delta or "" for part in model.stream_chat(turns)) == whole)
check("complete", model.complete("One two three").text)
