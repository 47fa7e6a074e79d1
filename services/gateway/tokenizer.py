"""The checkpoint's tokenizer and chat template."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as HfTokenizer

from common.errors import ConfigError, InvalidRequest
from services.gateway.detokenizer import byte_alphabet, piece


class Tokenizer:
    """Text and chat messages to token ids. `all_pieces`: the bytes of each token id, special tokens by their name;
    `pieces`: what each shows, nothing for special ones."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ConfigError that names the file and what is wrong with it."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{path} is missing: the gateway needs the checkpoint's tokenizer")
        try:
            self._tokenizer = HfTokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"{path} cannot be read: {error}") from None
        if "ByteLevel" not in repr(self._tokenizer.decoder):
            raise ConfigError(f"{path}: only byte-level tokenizers (decoder ByteLevel) are supported")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self.all_pieces = self._token_bytes()
        self.longest_token = max(map(len, self.all_pieces))  # bytes
        self.pieces = [b"" if i in self._special else shown for i, shown in enumerate(self.all_pieces)]
        self.reasons = self._tokenizer.token_to_id("</think>") is not None
        config = _read_json(folder / "tokenizer_config.json")
        self._template = ChatTemplate(_template_source(folder, config), config)

    @property
    def has_chat_template(self) -> bool:
        return self._template.present

    def encode(self, text: str) -> list[int]:
        """A prompt as the tokenizer means one to begin (with the begin-of-sequence token, if it adds one)."""
        return self._tokenizer.encode(text).ids

    def encode_chat(self, text: str) -> list[int]:
        """A rendered chat template, which writes its own special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def render(self, messages: Sequence[Mapping[str, Any]], extra: Mapping[str, Any]) -> str:
        return self._template.render(messages, extra)

    def token_id(self, text: str) -> int | None:
        """Of a text that the vocabulary has as one token."""
        return self._tokenizer.token_to_id(text)

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, special tokens by their name."""
        return self.all_pieces[token] if token < len(self.all_pieces) else b""

    def name(self, token: int) -> str:
        """A token's entry in the vocabulary, as tokenizer.json writes it; empty beyond the vocabulary's end."""
        return self._tokenizer.id_to_token(token) or ""

    def _token_bytes(self) -> list[bytes]:
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        found = [b""] * (max(vocabulary.values()) + 1)
        alphabet = byte_alphabet()
        for token, i in vocabulary.items():
            found[i] = piece(token, alphabet)
        return found


class ChatTemplate:
    """A Jinja chat template as transformers renders it, in a sandbox: it comes with the checkpoint, not from us."""

    def __init__(self, source: str | None, config: Mapping[str, Any]) -> None:
        self._tokens = {name: _token(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self.present = source is not None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        environment.filters["tojson"] = _tojson
        try:
            self._template = environment.from_string(source or "")
        except jinja2.TemplateError as error:
            raise ConfigError(f"the checkpoint's chat template is malformed: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], extra: Mapping[str, Any]) -> str:
        if not self.present:
            raise InvalidRequest("this model has no chat template: use /v1/completions")
        values = {**self._tokens, "add_generation_prompt": True, **extra, "messages": messages}
        try:
            return self._template.render(values)
        # A template may fail on what a client sent in any way that Python code may (a key, a type, an index).
        except Exception as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}", "messages") from error


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # named templates; "default" is the plain one
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return value


def _token(value: Any) -> str:
    """A token in tokenizer_config.json: its text, or an object that holds it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value or ""


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
