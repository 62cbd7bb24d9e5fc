"""Models whose fields a user sets, with errors that a user can read."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from kvcompress.errors import ConfigError, KVCompressError, shown


class Configured(BaseModel):
    """A frozen model whose validation errors are `ConfigError`s of one readable line each."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise readable_error(error, type(self)) from None


def readable_error(error: ValidationError, model: type[BaseModel]) -> KVCompressError:
    """Turns pydantic's report into one `ConfigError` that names the field, what came and what is allowed."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if not str(part).startswith("function-"))
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, KVCompressError):
            if len(error.errors()) == 1:
                return cause
            lines.append(str(cause))
        elif item["type"] == "extra_forbidden":
            known = ", ".join(model.model_fields) or "none"
            lines.append(f"{where}: unknown field of {model.__name__}; its fields: {known}")
        else:
            lines.append(f"{where or model.__name__}: {item['msg']}; got {shown(item['input'])}")
    return ConfigError("; ".join(lines))
