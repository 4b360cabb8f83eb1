"""The model card (README.md) of a converted checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_dgemma import __version__
from mlx_dgemma.checkpoint import Checkpoint

from .recipes import RECIPES

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


def write(folder: Path, report: Report, checkpoint: Checkpoint) -> None:
    """Write README.md; a source whose weights stay as they are keeps its own."""
    own = checkpoint.path / "README.md"
    if report.unchanged and own.exists():
        shutil.copyfile(own, folder / "README.md")
        return
    data = _front_matter(own)
    base = data.get("base_model") if Path(report.source).exists() else report.source
    front: dict[str, Any] = {key: data[key] for key in CARRIED if key in data}
    front |= {"library_name": "mlx", "pipeline_tag": "image-text-to-text", "tags": ["mlx", "diffusion_gemma"]}
    if base:
        front["base_model"] = base
        if report.quantized:
            front["base_model_relation"] = "quantized"
    import yaml  # huggingface-hub brings it

    text = yaml.safe_dump(front, sort_keys=True, allow_unicode=True)
    (folder / "README.md").write_text(f"---\n{text}---\n\n{_body(report, base)}", encoding="utf-8")


def _body(report: Report, base: str | list | None) -> str:
    name = report.target.name
    if not base:
        origin = "a DiffusionGemma checkpoint"
    elif isinstance(base, str):
        origin = f"[{base}](https://huggingface.co/{base})"
    else:
        origin = ", ".join(base)
    flags = "" if report.recipe is None else f" --recipe {report.recipe}" if report.recipe in RECIPES else " -q"
    made = f"with mlx-dgemma {__version__}" + (f", recipe `{report.recipe}`" if report.recipe else "")
    rows = [f"| {NAMES[part]} | {how} |" for part, how in report.quantized.items()]
    rest = "vision tower, projector, norms, scalars" if rows else "all weights"
    rows.append(f"| {rest} | {report.dtype} |")
    table = "\n".join(rows)
    quality = ""
    if report.verification:
        v = report.verification
        quality = f"""
Compared with the source's float32 logits over {v.positions} positions of two denoising steps on random tokens:
mean KL divergence {v.mean_kl:.3g} nats, same best token at {v.argmax_agreement:.1%}, largest difference of a logit
{v.max_difference:.3g}.
"""
    source = base if isinstance(base, str) else "path/to/source"
    return f"""# {name}

{origin} in the layout of [MLX](https://github.com/ml-explore/mlx), converted {made}.
DiffusionGemma writes text by block diffusion: a whole canvas of tokens is denoised at once, a few dozen steps a
block. It reads text, pictures and video frames.

## Use

```bash
pip install mlx-dgemma
mlx-dgemma generate --model {name} "Why is the sky blue?"
```

```python
import mlx_dgemma

engine = mlx_dgemma.load("{name}")
print(engine.generate("Why is the sky blue?").text)
```

`{name}` is this folder or its Hub id.

## Weights

{report.parameters / 1e6:,.1f} M parameters, {report.nbytes / 1e9:.2f} GB, {report.bits_per_weight:.2f} bits per weight.

| part | stored as |
|---|---|
{table}
{quality}
Made by

```bash
mlx-dgemma convert --hf-path {source} --mlx-path {name}{flags}
```
"""


def _front_matter(readme: Path) -> dict[str, Any]:
    """The YAML block at a card's head; a card without one, or with a broken one, says nothing."""
    import yaml

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
