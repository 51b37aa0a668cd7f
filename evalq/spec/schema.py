"""JSON Schemas of the specs, for editors: `python -m evalq.spec.schema DIRECTORY` writes them."""

import json
import sys
from pathlib import Path
from typing import Any

from evalq.spec import DataSpec, ModelSpec


def schemas() -> dict[str, dict[str, Any]]:
    """File name -> JSON Schema. A model spec file is a list of models, or one."""
    model = _with_nulls(ModelSpec.model_json_schema())
    definitions = model.pop("$defs", {})
    models = {
        "$defs": definitions | {"ModelSpec": model},
        "title": "Model specs",
        "anyOf": [
            {"type": "array", "items": {"$ref": "#/$defs/ModelSpec"}, "minItems": 1},
            {"$ref": "#/$defs/ModelSpec"},
        ],
    }
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {
        "data.schema.json": dialect | _with_nulls(DataSpec.model_json_schema()),
        "models.schema.json": dialect | models,
    }


def _with_nulls(schema: dict[str, Any]) -> dict[str, Any]:
    """The same, with null for every key that has a default, as the loader takes it."""
    for object_schema in (schema, *schema.get("$defs", {}).values()):
        for name, value in object_schema["properties"].items():
            if name in object_schema.get("required", ()) or {"type": "null"} in value.get("anyOf", ()):
                continue
            kept = {k: value.pop(k) for k in ("default", "description", "title") if k in value}
            object_schema["properties"][name] = {"anyOf": [value, {"type": "null"}], **kept}
    return schema


def text(schema: dict[str, Any]) -> str:
    """As it stands in the file."""
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    for name, schema in schemas().items():
        (Path(sys.argv[1]) / name).write_text(text(schema), encoding="utf-8")
