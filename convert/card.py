"""The model card (README.md) of a converted checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from mlx_dgemma import __version__
from mlx_dgemma.errors import human

from .recipes import RECIPES, Recipe
from .report import Report
from .rounding.run import Rounding
from .search.plan import Plan

COPIED_KEYS = ("license", "license_name", "license_link", "language")  # front matter that also holds for the result
PART_NAMES = {
    "experts": "experts",
    "attention": "attention",
    "mlp": "dense MLP",
    "router": "router",
    "embedding": "embedding and head",
    "self_conditioning": "self-conditioning",
}


def write(folder: Path, report: Report, recipe: Recipe | None, source: Path) -> None:
    """Write README.md.

    Args:
        folder: the new checkpoint's folder.
        report: what was converted, and how.
        recipe: the recipe that was applied, or None.
        source: path of the source's model card, which may not exist. If the weights are unchanged, it is copied.
    """
    if report.unchanged and source.exists():
        shutil.copyfile(source, folder / "README.md")
        return
    data = _front_matter(source)
    base = data.get("base_model") if Path(report.source).exists() else report.source
    front: dict[str, Any] = {key: data[key] for key in COPIED_KEYS if key in data}
    front |= {"library_name": "mlx", "pipeline_tag": "image-text-to-text", "tags": ["mlx", "diffusion_gemma"]}
    if base:
        front["base_model"] = base
        if report.quantized:
            front["base_model_relation"] = "quantized"
    text = yaml.safe_dump(front, sort_keys=True, allow_unicode=True)
    (folder / "README.md").write_text(f"---\n{text}---\n\n{_body(report, recipe, base)}", encoding="utf-8")


def _body(report: Report, recipe: Recipe | None, base: str | list | None) -> str:
    name = report.target.name
    origin = f"[{base}](https://huggingface.co/{base})" if isinstance(base, str) else "A DiffusionGemma checkpoint"
    made = f"with mlx-dgemma {__version__}" + (f", recipe `{recipe.name}`" if recipe else "")
    rows = [f"| {PART_NAMES[part]} | {how} |" for part, how in report.quantized.items()]
    rows.append(f"| {'vision tower, projector, norms, scalars' if rows else 'all weights'} | {report.dtype} |")
    table = "\n".join(rows)
    command = f"mlx-dgemma convert --hf-path {base if isinstance(base, str) else 'SOURCE'} --mlx-path {name}"
    return f"""# {name}

{origin} in the layout of [MLX](https://github.com/ml-explore/mlx), converted {made}.
DiffusionGemma generates text by block diffusion: it denoises a block (canvas) of tokens at once, in at most a few dozen
steps per block. It takes text, images and video frames as input.

## Use

Replace `{name}` with the path of this folder or its Hub id.

```bash
pip install mlx-dgemma
mlx-dgemma generate --model {name} "Why is the sky blue?"
```

```python
import mlx_dgemma

engine = mlx_dgemma.load("{name}")
print(engine.generate("Why is the sky blue?").text)
```

## Weights

{report.parameters / 1e6:,.1f} M parameters, {human(report.nbytes)}, {report.bits_per_weight:.2f} bits per weight.
Made with `{command}{_flags(report, recipe)}`.

| part | stored as |
|---|---|
{table}
{_rounding(report.rounding)}{_quality(report)}"""


def _flags(report: Report, recipe: Recipe | None) -> str:
    """The command-line options that repeat this conversion."""
    dtype = f" --dtype {report.dtype}"
    if recipe is None or recipe.experts is None:
        return dtype
    if report.rounding:
        dtype = f" --rounding {report.rounding.method}{dtype}"
    if isinstance(recipe, Plan):
        return f" --target-size {report.nbytes / 1e6:.0f}MB{dtype}"
    if recipe.name in RECIPES:
        return f" --recipe {recipe.name}{dtype}"
    bits, group_size, mode = recipe.experts.bits, recipe.experts.group_size, recipe.experts.mode
    return f" -q --q-bits {bits} --q-group-size {group_size} --q-mode {mode}{dtype}"


def _rounding(rounding: Rounding | None) -> str:
    """What was done for better rounding, module by module."""
    if rounding is None:
        return ""
    told = f"""
Rounded by {rounding.method} on denoising steps of the source:
{rounding.positions:,} positions of {rounding.prompts} prompts.
"""
    if rounding.modules:
        rows = "\n".join(
            f"| {one.path} | {one.nearest:.2g} | {one.error:.2g} | {one.few or ''} |" for one in rounding.modules
        )
        told += f"""
<details><summary>Squared error of each module's outputs, as a share of the squared outputs</summary>

| module | nearest codes | as rounded | experts with few positions of their own |
|---|---|---|---|
{rows}

</details>
"""
    return told


def _quality(report: Report) -> str:
    result = report.verification
    if result is None:
        return ""
    return f"""
Compared with the source's logits, both in float32, over {result.positions} positions of two denoising steps: mean KL
divergence {result.mean_kl:.3g} nats, same top token at {result.argmax_agreement:.1%} of positions, largest logit
difference {result.max_difference:.3g}.
"""


def _front_matter(readme: Path) -> dict[str, Any]:
    """The YAML front matter of a model card; empty if it is missing or broken."""
    if not readme.exists():
        return {}
    before, start, rest = readme.read_text(encoding="utf-8", errors="replace").partition("---\n")
    block, end, _ = rest.partition("\n---")
    if before or not start or not end:
        return {}
    try:
        data = yaml.safe_load(block)
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}
