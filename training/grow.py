"""Turn a trained small model into a larger one that computes the same, and train that on.

    python -m training.grow SMALL_RUN --from SMALL_RECIPE --recipe RECIPE --out DIR

Retrieval is learned three times faster by a model of a quarter of the size; language profits from
width. So the small one learns to retrieve first. Growing keeps the function:

    Chen et al., "Net2Net: accelerating learning via knowledge transfer", arXiv:1511.05641.

The residual stream is held f times over, x' = (x, .., x). A matrix then becomes f x f copies of
itself divided by f, heads and hidden units are f times as many, and added layers write nothing.
Random terms that cancel over the copies of the input tell the copies apart without a change in the
function. Deviation: whole blocks are copied, not single units, so that heads stay whole.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor

from training import checkpoint, config
from training.model import Llama

SILENT = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def grow(
    weights: dict[str, Tensor], small: config.ModelConfig, large: config.ModelConfig, seed: int
) -> dict[str, Tensor]:
    """Weights of the ``large`` model that computes what ``weights`` compute in the ``small`` one."""
    factor = _factor(small, large)
    generator = torch.Generator().manual_seed(seed)
    grown = dict(Llama(large, seed=seed).state_dict())
    for name, tensor in weights.items():
        if tensor.ndim == 1:
            grown[name] = tensor.repeat(factor)
        elif "embed" in name:
            grown[name] = tensor.repeat(1, factor)
        else:
            grown[name] = _tell_apart(tensor.repeat(factor, factor) / factor, factor, generator)
    # The tied output projection sums over all copies.
    grown["model.norm.weight"] /= factor
    for layer in range(small.layers, large.layers):
        for part in SILENT:
            grown[f"model.layers.{layer}.{part}"].zero_()
    return grown


def _tell_apart(matrix: Tensor, factor: int, generator: torch.Generator) -> Tensor:
    """Add noise as strong as the matrix that sums to zero over the copies of each input."""
    noise = torch.randn(matrix.shape, generator=generator) * matrix.square().mean().sqrt()
    copies = noise.unflatten(1, (factor, -1))
    return matrix + (copies - copies.mean(1, keepdim=True)).flatten(1)


def _factor(small: config.ModelConfig, large: config.ModelConfig) -> int:
    """How many times wider; every width must have grown alike, and depth may grow freely."""
    widths = ("hidden", "intermediate", "heads", "kv_heads")
    factors = {name: getattr(large, name) / getattr(small, name) for name in widths}
    if len(set(factors.values())) > 1 or not all(f.is_integer() for f in factors.values()):
        raise ValueError(f"all widths must grow by one whole factor, not by {factors}")
    fixed = ("vocab", "head_dim", "rope_theta", "norm_eps")
    if any(getattr(small, n) != getattr(large, n) for n in fixed) or small.layers > large.layers:
        raise ValueError(f"{fixed} must stay and layers must not become fewer: {small}, {large}")
    return int(factors["hidden"])


def grow_run(run: Path, small: config.Recipe, large: config.Recipe, out: Path) -> Path:
    """Write the newest checkpoint of ``run``, grown, as the first one of ``out``."""
    tensors, state = checkpoint.load(checkpoint.steps(run / "checkpoints")[-1])
    grown: dict[str, Tensor] = {}
    for kind in ("model", "average"):
        prefix = f"{kind}/"
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        larger = grow(own, small.model, large.model, large.seed)
        grown |= {f"{prefix}{name}": tensor for name, tensor in larger.items()}
    if not (out / "data").exists():
        shutil.copytree(run / "data", out / "data")
    step = state.pop("step")
    return checkpoint.save(
        out / "checkpoints", step, grown, {**state, "grown_from": state["tokens"]}
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--from", dest="small", type=Path, required=True, help="its recipe")
    parser.add_argument("--recipe", type=Path, required=True, help="the recipe to go on with")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def main() -> None:
    args = parser().parse_args()
    grow_run(args.run, config.load(args.small), config.load(args.recipe), args.out)


if __name__ == "__main__":
    main()
