"""Kinds of values that settings have: what is allowed, and how an error and the reference name it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from prime_async.config.contact import Contact, is_host
from prime_async.errors import ConfigError


def words(text: str) -> dict[str, Any]:
    """What error messages and the reference say is expected, where a pattern would say it badly."""
    return {"expected": text}


def _path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and value else value


def _optional_path(value: Any) -> Any:
    return None if value == "" else _path(value)


def _contact(text: str) -> str:
    try:
        return str(Contact.parse(text))
    except ConfigError as error:
        raise PydanticCustomError("contact", "{text}", {"text": str(error)}) from error


def check_host(text: str) -> str:
    if text and not is_host(text):
        raise PydanticCustomError("host", "not a host name or address")
    return text


def check_dashboard(text: str) -> str:
    host, colon, port = text.rpartition(":")
    inside = host.removeprefix("[").removesuffix("]")
    valid = colon and is_host(inside) and port.isascii() and port.isdigit() and int(port) < 65536
    if text and not valid:
        raise PydanticCustomError("dashboard", "not HOST:PORT")
    return text


Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=3600)]  # a Get on the wire waits an hour at most
UpToADay = Annotated[float, Field(ge=0, le=86_400)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
# An empty path would be the current folder, which nobody means.
FilePath: TypeAlias = Annotated[Path, BeforeValidator(_path)]
OptionalPath: TypeAlias = Annotated[Path | None, BeforeValidator(_optional_path)]
ContactText: TypeAlias = Annotated[
    str, AfterValidator(_contact), Field(json_schema_extra=words('a contact "KEY@HOST:PORT"'))
]
SinkText: TypeAlias = Annotated[
    str,
    Field(
        max_length=1024,
        pattern=r"^(tensorboard|wandb|trackio):\P{Cc}+$",
        json_schema_extra=words('"tensorboard:FOLDER", "wandb:PROJECT" or "trackio:PROJECT"'),
    ),
]
AllowText: TypeAlias = Annotated[
    str,
    Field(
        pattern=r"^([0-9a-f]{64}|any)$",
        json_schema_extra=words('a public key of 64 lower-case hexadecimal digits, or "any"'),
    ),
]


class Settings(BaseModel):
    """Frozen; an unknown key, a value of another type (``"4"`` for 4), infinity and NaN are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
