"""Base of all config models: unknown keys fail, values are immutable, every field has a docstring."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A strict, frozen pydantic model; field docstrings become the schema's descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
