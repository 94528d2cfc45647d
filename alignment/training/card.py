"""The model card of a stage: base, data, recipe, versions and metrics, in Markdown."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import yaml

from alignment.pipeline.plan import StageSpec
from alignment.recipe.algorithms import ALGORITHMS


def card(spec: StageSpec, model: dict[str, Any], metrics: dict[str, float]) -> str:
    """The text of `README.md` in a published folder; paths and metrics as they were, nothing guessed."""
    stage, row = spec.config, ALGORITHMS[spec.config.algorithm]
    assert stage.model is not None
    source = f"stage `{stage.model.stage}`" if stage.model.stage else stage.model.path or "random weights"
    data = "\n".join(f"- `{source_.path}`" for source_ in (stage.data.train if stage.data else []))
    numbers = "\n".join(f"| `{key}` | {value:.4g} |" for key, value in sorted(metrics.items()))
    settings = yaml.safe_dump({"train": dict(stage.train), "peft": stage.peft}, sort_keys=True)
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("trl", "transformers", "torch"))
    tags = yaml.safe_dump(
        {"library_name": "peft" if model["adapter"] else "transformers", "tags": ["alignment", "trl", row.name]},
        sort_keys=True,
    )
    return f"""---
{tags}---

# {spec.run}/{spec.stage}

{row.summary[0].upper()}{row.summary[1:]}{f" ({row.paper})" if row.paper else ""}.

- Started from: {source}
- Architecture: {model["architecture"]}, {model["parameters"]:,} parameters, {model["trained_parameters"]:,} trained
- Recipe: `{spec.recipe_path.name}`, stage `{spec.stage}`, seed {stage.seed}
- Fingerprint: `{spec.fingerprint_sha256[:16]}`
- Rows per optimizer step: {stage.batch.global_}
- Versions: {packages}

## Data

{data or "none"}

## Settings

```yaml
{settings}```

## Metrics

| metric | value |
|---|---|
{numbers}
"""
