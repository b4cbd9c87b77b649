"""Base of all config models: unknown keys fail, values are immutable, every field has a docstring."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Settings(BaseModel):
    """A strict, frozen pydantic model; field docstrings become the schema's descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


def added(neutral: Any) -> Any:
    """Return the default of a field that joined a stored model after schema version 1.

    At this value, which must mean what its absence meant, the field is left out of the JSON. So the fingerprints,
    checksums and files of datasets that know nothing of the field stay as they are, byte for byte, and so do the
    facts of trainings.
    """
    return Field(default=neutral, exclude_if=lambda value: value == neutral)


def first_problem(error: ValidationError) -> str:
    """Return the first thing that is wrong with stored or given fields, as `field.name: what`."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
