"""A model's tokenizer, chat template and ends of answers, read from its Hugging Face folder."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hexgen2.errors import ConfigError, InvalidRequest
from hexgen2.text.chat import ChatTemplate
from hexgen2.text.detokenize import Detokenizer

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class TextModel:
    """What the gateway knows of a model. ``eos_token_ids`` end an answer unless the client says ``ignore_eos``."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    eos_token_ids: tuple[int, ...]
    #: Sampling defaults that the model's authors recommend (``generation_config.json``).
    sampling_defaults: Mapping[str, float]

    @classmethod
    def load(cls, folder: Path) -> "TextModel":
        """Read the folder.

        Raises:
            ConfigError: no usable ``tokenizer.json``.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"model: {path} does not exist; a model folder must hold a tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"model: {path} cannot be read: {error}") from error
        # Settings of training, not of serving.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        settings = _read_json(folder / "tokenizer_config.json")
        special = {name: text for name in _SPECIAL if (text := _token_text(settings.get(name)))}
        source = _template_source(folder, settings)
        generation = _read_json(folder / "generation_config.json")
        return cls(
            tokenizer,
            None if source is None else ChatTemplate(source, special),
            _eos_token_ids(tokenizer, special, generation, _read_json(folder / "config.json")),
            _sampling_defaults(generation),
        )

    @cached_property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def _added(self) -> dict[int, tuple[str, bool]]:
        return {i: (token.content, token.special) for i, token in self.tokenizer.get_added_tokens_decoder().items()}

    @cached_property
    def _byte_level(self) -> bool:
        decoder = json.loads(self.tokenizer.to_str()).get("decoder") or {}
        return "ByteLevel" in {decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", ()))}

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a plain prompt, with what the model wants around it (e.g. BOS)."""
        return tuple(self.tokenizer.encode(text).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Token ids of a conversation; the template writes special tokens itself.

        Raises:
            InvalidRequest: the model has no chat template, or its template refuses the messages.
        """
        if self.chat_template is None:
            raise InvalidRequest("messages", "this model has no chat template; use /v1/completions")
        return tuple(self.tokenizer.encode(self.chat_template.render(messages), add_special_tokens=False).ids)

    def detokenizer(self, prompt_token_ids: Sequence[int] = ()) -> Detokenizer:
        """For one answer to this prompt."""
        return Detokenizer(self.tokenizer.decode, self._skipped, prompt_token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, as far as the tokenizer tells; a special token's are its name."""
        if token_id in self._added:
            return self._added[token_id][0].encode()
        token = self.tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return bytes(_BYTE_OF[char] for char in token if char in _BYTE_OF)
        if match := _BYTE_FALLBACK.fullmatch(token):
            return bytes((int(match[1], 16),))
        return token.replace("\u2581", " ").encode()

    def _skipped(self, token_id: int) -> bool:
        added = self._added.get(token_id)
        return added[1] if added else self.tokenizer.id_to_token(token_id) is None


def _bytes_of_characters() -> dict[str, int]:
    """The inverse of GPT-2's map of bytes to printable characters, which byte-level vocabularies are written in."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _bytes_of_characters()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"model: {path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"model: {path} is not a JSON object")
    return value


def _token_text(value: Any) -> str | None:
    """A special token is written as its text or as an object with ``content``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template_source(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template: its own file, or a field; of several named ones the default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    value = _read_json(folder / "chat_template.json").get("chat_template", settings.get("chat_template"))
    if isinstance(value, list):
        value = {str(each.get("name")): each.get("template") for each in value if isinstance(each, dict)}.get("default")
    return value if isinstance(value, str) else None


def _eos_token_ids(
    tokenizer: Tokenizer, special: Mapping[str, str], generation: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[int, ...]:
    value = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = {each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)}
    eos = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return tuple(sorted(ids | ({eos} if eos is not None else set())))


def _sampling_defaults(generation: Mapping[str, Any]) -> dict[str, float]:
    """As vLLM's server takes them."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return {name: value for name in names if isinstance(value := generation.get(name), int | float)}
