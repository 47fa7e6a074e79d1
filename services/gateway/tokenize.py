"""POST /tokenize and /detokenize, as vLLM has them: what a prompt is for the model, and how much of its context."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from common.errors import InvalidRequest
from services.gateway.conversation import render
from services.gateway.prepare import Preparer, off_loop
from services.gateway.protocol import ChatBody, ChatMessage, TokenId, Tool, check


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """Either a prompt, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class Tokens(msgspec.Struct, frozen=True):
    """`count` tokens of the `max_model_len` that prompt and output share."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    tokens: list[TokenId]


class Text(msgspec.Struct, frozen=True):
    prompt: str


class Counter:
    """Token ids of texts and back, for the model that is served."""

    def __init__(self, preparer: Preparer) -> None:
        self._preparer = preparer
        self._tokenizer = preparer.tokenizer

    async def tokenize(self, body: TokenizeBody) -> Tokens:
        """Raises InvalidRequest, or ModelNotFound. A prompt a little over the context is counted all the same."""
        if body.model is not None:
            self._preparer.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("send either prompt or messages", "prompt")
        # A chat template writes the special tokens itself.
        special = body.prompt is not None if body.add_special_tokens is None else body.add_special_tokens
        text = await self._text(body)
        self._preparer.check_length(text, "messages" if body.prompt is None else "prompt")
        return await off_loop(len(text), self._tokens, text, special, bool(body.return_token_strs))

    def _tokens(self, text: str, special: bool, named: bool) -> Tokens:
        tokens = (self._tokenizer.encode if special else self._tokenizer.encode_chat)(text)
        names = [self._tokenizer.name(token) for token in tokens] if named else None
        return Tokens(len(tokens), self._preparer.context, tokens, names)

    async def _text(self, body: TokenizeBody) -> str:
        if body.messages is None:
            return body.prompt or ""
        chat = ChatBody(
            model=self._preparer.name,
            messages=body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
            tools=body.tools,
        )
        check(chat)
        size = sum(len(message.text) for message in body.messages)
        return (await off_loop(size, render, chat, self._tokenizer)).text

    async def detokenize(self, body: DetokenizeBody) -> Text:
        """All of the text, special tokens by their names. Raises InvalidRequest, or ModelNotFound."""
        if body.model is not None:
            self._preparer.check_model(body.model)
        self._preparer.check_ids(body.tokens, "tokens")
        return Text(await off_loop(len(body.tokens), self._decoded, body.tokens))

    def _decoded(self, tokens: list[int]) -> str:
        return b"".join(map(self._tokenizer.token_bytes, tokens)).decode(errors="replace")
