"""What may be asked: OpenAI's request bodies as far as this server goes, and errors that name the field."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from openelm.config import Config
from openelm.serve.refusal import Refusal

MOST_CHOICES = 16
MOST_ALTERNATIVES = 20
_NOT_OFFERED = {
    "tools": "this server calls no tools",
    "tool_choice": "this server calls no tools",
    "parallel_tool_calls": "this server calls no tools",
    "functions": "this server calls no functions",
    "function_call": "this server calls no functions",
    "tool_calls": "this server calls no tools",
    "tool_call_id": "this server calls no tools",
    "modalities": "this server answers with text only",
    "audio": "this server answers with text only",
    "suffix": "this model continues text, it does not fill gaps",
    "best_of": "this server returns every choice it makes; use n",
    "store": "this server stores nothing",
    "prediction": "predicted outputs are not offered",
    "reasoning_effort": "this model does not reason before it answers",
    "web_search_options": "this server makes no requests of its own",
    "service_tier": "there is one tier",
    "verbosity": "there is no such control; use max_tokens",
    "name": "names of speakers are not part of this model's chat format",
}
"""Fields of OpenAI's API that are refused, and why: taking them and doing nothing would be a lie."""

_MOST = 2**31 - 1
_SEVERAL_KINDS = {
    "prompt": "text, a list of texts, a list of token ids, or a list of such lists",
    "content": 'text, or a list of {"type": "text", "text": …}',
}
"""Of these pydantic tells what is wrong with each kind; a person wants to know which kinds there are."""

Stop = Annotated[str, Field(min_length=1, max_length=256)]
Body = TypeVar("Body", bound="_Body")


class _Body(Config):
    """Null is as absent: OpenAI's client sends it for what was not set."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )


class Part(_Body):
    """A piece of a message; text is the only kind."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One turn; `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[Part, ...]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Body):
    """`include_usage` asks for a last event with the tokens counted."""

    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(_Body):
    """A schema by name, as OpenAI's API wants it; every schema is kept strictly here."""

    name: str
    schema_: dict[str, Any] = Field({}, alias="schema")
    description: str = ""
    strict: bool = True


class ResponseFormat(_Body):
    """Text of any kind, JSON of any kind, or JSON that a schema accepts."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema is given exactly with type "json_schema"')
        return self

    @property
    def schema_of_text(self) -> dict[str, Any] | None:
        """What the text must follow; {} is any JSON object."""
        if self.type == "text":
            return None
        return self.json_schema.schema_ if self.json_schema else {"type": "object"}


class Asked(_Body):
    """What chats and completions have in common: how to choose tokens, and when to stop."""

    model: str
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: tuple[Stop, ...] = Field((), max_length=16)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, max_length=1024
    )
    user: str = Field("", max_length=1024)
    top_k: int | None = Field(None, ge=1, le=_MOST)
    min_p: float = Field(0.0, ge=0, le=1)
    response_format: ResponseFormat = ResponseFormat(type="text")
    regex: str | None = None
    grammar: str | None = None
    repetition_penalty: float = Field(1.0, gt=0, le=100)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, stop: Any) -> Any:
        return (stop,) if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Asked:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise ValueError("stream_options is allowed only with stream: true")
        return self


class ChatAsked(Asked):
    """The body of /v1/chat/completions."""

    messages: tuple[ChatMessage, ...] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1, le=_MOST)
    max_completion_tokens: int | None = Field(None, ge=1, le=_MOST)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)

    @model_validator(mode="after")
    def _alternatives_are_of_logprobs(self) -> ChatAsked:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is allowed only with logprobs: true")
        return self


class TextAsked(Asked):
    """The body of /v1/completions; a prompt is text or ids, and there may be several."""

    prompt: str | tuple[Annotated[int, Field(ge=0)], ...] | tuple[str, ...] | tuple[tuple[int, ...], ...]
    max_tokens: int = Field(16, ge=1, le=_MOST)
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    echo: bool = False

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = tuple(part for part in self.prompt if isinstance(part, int))
        return [ids] if ids or not self.prompt else [part for part in self.prompt if not isinstance(part, int)]


def parse(kind: type[Body], body: bytes) -> Body:
    """Read a request body.

    Raises:
        Refusal: 400; names the first field that is wrong, by its path.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        raise _explain(kind, details[0]) from None


def _explain(kind: type[_Body], detail: Any) -> Refusal:
    path = [part for part in detail["loc"] if not _is_name_of_kind(part)]
    key = str(path[-1])[:80] if path else ""
    if allowed := next((_SEVERAL_KINDS[part] for part in path if part in _SEVERAL_KINDS), None):
        path = path[: 1 + next(index for index, part in enumerate(path) if part in _SEVERAL_KINDS)]
        detail = {**detail, "type": "kind", "msg": f"must be {allowed}"} if detail["type"] != "missing" else detail
    param = ".".join(str(part)[:80] for part in path) or None
    if detail["type"] == "json_invalid":
        return Refusal(400, f"the body is not valid JSON: {detail['msg'].removeprefix('Invalid JSON: ')}")
    if detail["type"] == "missing":
        return Refusal(400, f"{param} is missing", param=param, code="missing_required_parameter")
    if detail["type"] == "extra_forbidden":
        if why := _NOT_OFFERED.get(key):
            return Refusal(400, f"{param}: {why}; leave it out", param=param, code="unsupported_parameter")
        near = difflib.get_close_matches(key, kind.model_fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return Refusal(400, f"unknown field {param}{hint}", param=param, code="unknown_parameter")
    message = detail["msg"].removeprefix("Value error, ")
    return Refusal(400, f"{param}: {message}" if param else message, param=param, code="invalid_value")


_KINDS = {"str", "int", "float", "bool"}


def _is_name_of_kind(part: int | str) -> bool:
    """Tell pydantic's names of a union's kinds from the names of fields."""
    return isinstance(part, str) and (part in _KINDS or "[" in part)
