"""The model card (README.md) of a converted checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mlx_dgemma import __version__
from mlx_dgemma.errors import human

from .recipes import RECIPES, Recipe

if TYPE_CHECKING:
    from .conversion import Report

CARRIED = ("license", "license_name", "license_link", "language")  # what a source's card says about the result, too
NAMES = {
    "experts": "experts",
    "attention": "attention",
    "mlp": "dense MLP",
    "router": "router",
    "embedding": "embedding and head",
    "self_conditioning": "self-conditioning",
}


def write(folder: Path, report: Report, recipe: Recipe | None, source: Path) -> None:
    """Write README.md into `folder`; `source` is the source's own card, if it has one.

    A source whose weights stay as they are keeps its card.
    """
    if report.unchanged and source.exists():
        shutil.copyfile(source, folder / "README.md")
        return
    data = _front_matter(source)
    base = data.get("base_model") if Path(report.source).exists() else report.source
    front: dict[str, Any] = {key: data[key] for key in CARRIED if key in data}
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
    rows = [f"| {NAMES[part]} | {how} |" for part, how in report.quantized.items()]
    rows.append(f"| {'vision tower, projector, norms, scalars' if rows else 'all weights'} | {report.dtype} |")
    table = "\n".join(rows)
    command = f"mlx-dgemma convert --hf-path {base if isinstance(base, str) else 'SOURCE'} --mlx-path {name}"
    return f"""# {name}

{origin} in the layout of [MLX](https://github.com/ml-explore/mlx), converted {made}.
DiffusionGemma writes text by block diffusion: a whole canvas of tokens is denoised at once, in a few dozen steps a
block at most. It reads text, pictures and video frames.

## Use

`{name}` stands for this folder or its Hub id.

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
Made by `{command}{_flags(report, recipe)}`.

| part | stored as |
|---|---|
{table}
{_quality(report)}"""


def _flags(report: Report, recipe: Recipe | None) -> str:
    """The options that make this conversion again."""
    dtype = f" --dtype {report.dtype}"
    if recipe is None or recipe.experts is None:
        return dtype
    if recipe.name in RECIPES:
        return f" --recipe {recipe.name}{dtype}"
    bits, group_size, mode = recipe.experts.bits, recipe.experts.group_size, recipe.experts.mode
    return f" -q --q-bits {bits} --q-group-size {group_size} --q-mode {mode}{dtype}"


def _quality(report: Report) -> str:
    found = report.verification
    if found is None:
        return ""
    return f"""
Compared with the source's logits, both in float32, over {found.positions} positions of two denoising steps: mean KL
divergence {found.mean_kl:.3g} nats, same best token at {found.argmax_agreement:.1%}, largest difference of a logit
{found.max_difference:.3g}.
"""


def _front_matter(readme: Path) -> dict[str, Any]:
    """The YAML block at a card's head; a card without one, or with a broken one, says nothing."""
    if not readme.exists():
        return {}
    head, mark, rest = readme.read_text(encoding="utf-8", errors="replace").partition("---\n")
    block, end, _ = rest.partition("\n---")
    if head or not mark or not end:
        return {}
    try:
        data = yaml.safe_load(block)
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}
