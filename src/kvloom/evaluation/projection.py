"""Keys and centroids on a plane, by one projection for both: PCA, t-SNE, UMAP.

t-SNE (van der Maaten and Hinton, JMLR 2008) and UMAP (arXiv:1802.03426) are those of scikit-learn and
umap-learn, fitted jointly to keys and centroids, since neither can place a point afterwards as it
places the others. PCA is fitted to the keys alone, and the centroids are projected onto its axes.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PERPLEXITY = 30.0  # of t-SNE; less for few points
NEIGHBOURS = 15  # of UMAP
SEED = 0


@dataclass(frozen=True)
class Projection:
    """How a plane came about.

    Attributes:
        name: `"pca"`, `"tsne"` or `"umap"`. facts: of PCA `explained_1`, `explained_2` (shares of the
            variance); of t-SNE `kl_divergence` (nats) and `perplexity`; of UMAP `neighbours`.
    """

    name: str
    facts: dict[str, float]


def available() -> list[str]:
    """Which projections can be made here. Raises ValueError if scikit-learn is missing."""
    if importlib.util.find_spec("sklearn") is None:
        raise ValueError(
            "t-SNE needs scikit-learn, which is not installed: pip install 'kvloom[analyze]'"
        )
    return ["pca", "tsne", *(["umap"] if importlib.util.find_spec("umap") else [])]


def project(name: str, keys: Tensor, centroids: Tensor, metric: str) -> tuple[Tensor, Projection]:
    """Places of `keys [S, D]`, then of `centroids [n, D]`: fp32 `[S + n, 2]`.

    `metric` (`"cosine"` or `"euclidean"`) is for t-SNE and UMAP.
    """
    makers = {"pca": _pca, "tsne": _tsne, "umap": _umap}
    places, facts = makers[name](keys.double(), centroids.double(), metric)
    return places.float().contiguous(), Projection(name, facts)


def _pca(keys: Tensor, centroids: Tensor, metric: str) -> tuple[Tensor, dict[str, float]]:
    mean = keys.mean(0)
    _, singular, axes = torch.linalg.svd(keys - mean, full_matrices=False)
    axes = axes[:2]
    largest = axes.abs().argmax(
        1, keepdim=True
    )  # a sign of its own for each axis: the SVD has none
    axes = axes * axes.gather(1, largest).sign()
    share = (singular**2 / (singular**2).sum().clamp_min(1e-300)).tolist()
    facts = {"explained_1": share[0], "explained_2": share[1]}
    return (torch.cat([keys, centroids]) - mean) @ axes.T, facts


def _tsne(keys: Tensor, centroids: Tensor, metric: str) -> tuple[Tensor, dict[str, float]]:
    manifold: Any = importlib.import_module("sklearn.manifold")
    points = torch.cat([keys, centroids]).float().numpy()
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    model = manifold.TSNE(
        n_components=2, perplexity=perplexity, metric=metric, init="pca", random_state=SEED
    )
    places = torch.from_numpy(model.fit_transform(points))
    return places, {"kl_divergence": float(model.kl_divergence_), "perplexity": perplexity}


def _umap(keys: Tensor, centroids: Tensor, metric: str) -> tuple[Tensor, dict[str, float]]:
    umap: Any = importlib.import_module("umap")
    points = torch.cat([keys, centroids]).float().numpy()
    neighbours = min(NEIGHBOURS, len(points) - 1)
    model = umap.UMAP(
        n_components=2, n_neighbors=neighbours, metric=metric, random_state=SEED, n_jobs=1
    )
    return torch.as_tensor(model.fit_transform(points)), {"neighbours": float(neighbours)}
