"""What each field of a request means, and what holds where it is left out (or null): for the OpenAPI document.

One sentence a name, since a name means the same in every body; `Struct.name` where it does not.
"""

from __future__ import annotations

FIELDS: dict[str, str] = {
    # ---- what to answer
    "model": "The model's name, as /v1/models gives it.",
    "messages": "The conversation so far, oldest first.",
    "prompt": "A text, a list of token ids, or a list of either: each is a prompt of its own.",
    "input": "The conversation so far: a text (one message of the user), or a list of messages, oldest first.",
    "instructions": "A system message before all others. Default: none.",
    "add_special_tokens": "Begin with the tokenizer's begin token. Default: true for a prompt, false for messages "
    "(the template writes it).",
    "chat_template_kwargs": "Further variables for the model's chat template. Default: none.",
    "add_generation_prompt": "End the prompt with what opens the assistant's answer. Default: true.",
    "continue_final_message": "Write on at the last message instead of beginning an answer. Default: false.",
    "reasoning_effort": "Handed to the model's chat template, which may heed it. Default: none.",
    "echo": "Give the prompt back before the output; with `logprobs`, its tokens are scored too. Default: false.",
    "suffix": "Not supported: only an empty text is taken.",
    # ---- how much
    "max_tokens": "Most tokens of output, reasoning included. Default: what context and KV cache leave.",
    "max_completion_tokens": "The newer name of `max_tokens`; it wins where both are given.",
    "max_output_tokens": "Most tokens of output, reasoning included. Default: what context and KV cache leave.",
    "min_tokens": "Until there are so many tokens, neither the end token nor a stop ends the output. Default: 0.",
    "n": "Choices a prompt. Default: 1.",
    "best_of": "Only the value of `n` is taken.",
    "stop": "Texts before which the output ends; they are not part of it. Default: none.",
    "stop_token_ids": "Token ids that end the output as the model's own end token does. Default: none.",
    "include_stop_str_in_output": "Show the stop text that ended the output. Default: false.",
    "ignore_eos": "Go on after the model's end token: load generators ask for outputs of a given length so. "
    "Default: false.",
    # ---- sampling
    "temperature": "0, or less than 1e-6, is greedy: always the likeliest token. Default: generation_config.json's, "
    "else 1.",
    "top_p": "Sample from the likeliest tokens that have this much probability together. Default: "
    "generation_config.json's, else 1.",
    "top_k": "Sample from so many likeliest tokens; 0 or -1: no limit. Default: generation_config.json's, else 0.",
    "min_p": "Leave out tokens below this share of the likeliest one's probability. Default: 0.",
    "seed": "The same seed, prompt and parameters give the same output; choice i takes seed + i. Default: random.",
    "presence_penalty": "Subtracted from the logits of tokens that are in the output already. Default: 0.",
    "frequency_penalty": "Subtracted from the logit of a token as often as it is in the output already. Default: 0.",
    "repetition_penalty": "Divides (above 0) or multiplies (below) the logits of tokens that are in prompt or output "
    "already. Default: 1.",
    "logit_bias": "Token id (as a text) to what is added to its logit, from -100 to 100. Default: none.",
    # ---- shape of the output
    "response_format": "`text`, `json_object`, or `json_schema` with a schema that the output will match. "
    "Reasoning, where the model does, comes before and is free; it ends at the latest when three quarters of the "
    "output are used up. Default: text.",
    "structured_outputs": "vLLM's way to say what the output must match: one of `json`, `regex`, `grammar` (Lark), "
    "`choice`. Default: none.",
    "guided_json": "A JSON schema the output must match; the older name of `structured_outputs.json`.",
    "guided_regex": "A regular expression the output must match; the older name of `structured_outputs.regex`.",
    "guided_grammar": "A grammar the output must match; the older name of `structured_outputs.grammar`.",
    "guided_choice": "Texts of which the output must be one; the older name of `structured_outputs.choice`.",
    "text": "`format`: `text`, `json_object`, or `json_schema` with a schema that the output will "
    "match. Default: text.",
    "tools": "Functions that the model may call. Default: none.",
    "tool_choice": "`none`, `auto`, `required`, or the one function that must be called; a call that must come has the "
    "last quarter of the output, however long the model reasons. Default: auto with tools.",
    "parallel_tool_calls": "false: at most one call an answer. Default: true.",
    "functions": "The older form of `tools`, not supported: only an empty list is taken.",
    "function_call": "The older form of `tool_choice`, not supported.",
    # ---- form of the answer
    "stream": "Answer with server-sent events as the output comes. Default: false.",
    "stream_options": "Of a stream: `include_usage` adds a last chunk with the usage, `continuous_usage_stats` puts it "
    "into every chunk. Default: neither.",
    "ChatBody.logprobs": "Give the logprob of every output token. Default: false.",
    "logprobs": "Give the logprob of every output token and so many alternatives. Default: none.",
    "top_logprobs": "How many alternatives a token come with `logprobs`. Default: 0.",
    "prompt_logprobs": "Give the logprob of every prompt token and so many alternatives. Default: none.",
    "skip_special_tokens": "false shows special tokens by their names. Default: true.",
    "return_token_ids": "Give the ids of the prompt's and the output's tokens too. Default: false.",
    "metadata": "Up to 16 texts, given back with the answer. Default: none.",
    # ---- other
    "user": "Taken and not used.",
    "cache_salt": "Cached prompts are shared only between requests of one salt. Default: the empty one.",
    "priority": "A lower number is served earlier, and may take the place of a higher one that runs; a key bounds it. "
    "Default: the key's own, else 0.",
    "timeout": "Seconds from the request's start after which it ends with `deadline_exceeded`, wherever it is. The "
    "header `x-request-deadline-ms` says the same; the sooner holds. Default: none.",
    "service_tier": "Taken and not used: there is one tier.",
    "ChatBody.store": "Taken and not used: this server stores no answers.",
    "ChatBody.metadata": "Taken and not used.",
    # ---- /v1/responses: what the API has and a server without memory has not
    "reasoning": "Taken and not used: a model that reasons always does, and its reasoning is always given.",
    "include": "`reasoning.encrypted_content` is taken and not used (reasoning comes in clear text); nothing else is.",
    "previous_response_id": "Refused: this server keeps no conversations. Send all of it in `input`.",
    "conversation": "Refused: this server keeps no conversations. Send all of it in `input`.",
    "ResponsesBody.prompt": "Refused: this server keeps no prompt templates.",
    "background": "Only false is taken: this server makes no answers in the background.",
    "store": "Only false is taken: this server stores no answers.",
    "ResponsesBody.tools": "Only an empty list is taken: tools are called through /v1/chat/completions.",
    "ResponsesBody.tool_choice": "Only `none` and `auto` are taken, as there are no tools.",
    "truncation": "Only `disabled` is taken: this server shortens no input.",
    "ResponsesBody.top_logprobs": "Only 0 is taken: logprobs are given by /v1/chat/completions.",
    # ---- /tokenize, /detokenize
    "TokenizeBody.prompt": "A text. Either this or `messages`.",
    "TokenizeBody.messages": "A chat, rendered with the model's chat template. Either this or `prompt`.",
    "TokenizeBody.model": "The model's name, as /v1/models gives it. Default: the model there is.",
    "DetokenizeBody.model": "The model's name, as /v1/models gives it. Default: the model there is.",
    "return_token_strs": "Give the tokens' entries in the vocabulary too. Default: false.",
    "tokens": "Token ids.",
}


def meaning(struct: str, field: str) -> str:
    """Empty where nothing is said."""
    return FIELDS.get(f"{struct}.{field}") or FIELDS.get(field, "")
