"""MP-KVM: evicted tokens live on in clusters of pre-RoPE keys, each as heavy as its members are many.

    j = argmax_c sim(k, K_c);   sim >= threshold: K_j <- (m_j K_j + k) / (m_j + 1), V_j, p_j likewise,
    m_j <- m_j + 1;   else k opens a centroid, and above max_centroids the two most similar merge
    logit_j = q . RoPE(K_j, p_j) / sqrt(d) + log m_j

Xq199911/npm (GitHub, 2025), without a paper; the bias is ToMe's (arXiv:2210.09461). A key that
resembles nothing becomes its own centroid, and the closest pair among the others pays for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvloom.core.block import Block
from kvloom.core.merge import CentroidMerger, Losers, Memory
from kvloom.policies.merge import _clusters, _mp_kvm


@dataclass(frozen=True)
class MPKVM(CentroidMerger):
    """Cluster what is evicted; alone in a recipe, it evicts all but sinks and a recent window.

    Deviations, by default: each head clusters its own keys; centroids stand at their members' mean
    position, so that a token alone in its centroid is what it was, up to rounding; they are 64, to leave room
    in small budgets. The code shares clusters over heads, rotates nothing, keeps 1,024 and no sinks:
    `mp_kvm_published`. Its first batch becomes one average; here tokens open centroids from the start.
    Euclidean similarity is 1 - d in every rule; its code ignores two of them there. `max_memory_size`
    (merging never lowers the count that it limits) is the budget here, the automatic window what that
    leaves. In a 16-bit model's centroids the mean of hundreds of tokens hardly moves any more.

    Attributes:
        window_size: exact newest tokens, where no scorer is named; None: what the budget leaves.
        sinks: first tokens pinned by the scorer that it brings along.
        max_centroids: per head. similarity_threshold: from which a token joins a centroid.
        adaptive_threshold: the threshold is the quantile of the best similarities of the last 64
            batches, this one included; a batch is a block, the last one of a compression may be short.
            threshold_quantile: that quantile.
        min_merge_similarity: below it the two lightest centroids merge, not the closest: lone keys get lost.
        init_preserve_first_n: so many first tokens of each head open centroids of their own.
        metric: `"cosine"` or `"euclidean"`, d <= 1 - threshold.
        per_head_clustering: False: one clustering per layer, by the keys of all heads side by side;
            needs a scorer that keeps the same entries in every head. head_mean: by their mean key.
        update: `"mean"`, or `"ema"`: a token moves key, value and position by 1 - ema; masses add.
            ema: the share that stays.
        sample_stride: only positions divisible by it are taken in, the others are dropped.
        positions: `"mean"` of the members, `"slot"` or `"positionless"` (published).
        rope: `"pre"`, or `"post"`: cluster rotated keys, which stand where they are.
        mass_bias: False: a centroid attends like one token.
        max_injected_centroids: only so many are attended to, the heaviest.
        per_layer_injection: compressed layers, from 0, that have centroids; None: all.
        flush_threshold: so many centroids may wait beyond max_centroids before pairs merge; seldom faster,
            and `lazy` saves more. flush_interval: they wait for that many tokens at most; 0: for ever.
        block: tokens compared at once with the centroids as they were; 1: one by one.

    Raises ValueError if a parameter contradicts the recipe or another parameter.
    """

    window_size: int | None = None
    sinks: int = 4
    max_centroids: int = 64
    similarity_threshold: float = 0.8
    adaptive_threshold: bool = False
    threshold_quantile: float = 0.9
    min_merge_similarity: float | None = None
    init_preserve_first_n: int | None = None
    metric: str = "cosine"
    per_head_clustering: bool = True
    head_mean: bool = False
    update: str = "mean"
    ema: float = 0.99
    sample_stride: int = 1
    positions: str = "mean"
    rope: str = "pre"
    mass_bias: bool = True
    max_injected_centroids: int | None = None
    per_layer_injection: tuple[int, ...] | None = None
    flush_threshold: int = 0
    flush_interval: int = 0
    block: int = 16

    name = "mp_kvm"
    fit = _mp_kvm.check_fit
    bias = _mp_kvm.bias
    takes = _clusters.takes

    def __post_init__(self) -> None:
        _mp_kvm.check_parameters(self)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"positions"} | ({"pre_rope_keys"} if self.rope == "pre" else set()))

    @property
    def conserves(self) -> bool:
        return self.sample_stride == 1

    @property
    def centroids(self) -> int:
        return self.max_centroids + self.flush_threshold

    @property
    def placing(self) -> str:
        return self.positions

    @property
    def own_scorer(self) -> str:
        return f"streaming_llm(sinks={self.sinks}, recent={self.window_size}, positions='original')"

    def serves(self, layer: int) -> bool:
        return self.per_layer_injection is None or layer in self.per_layer_injection

    def memory(self, rows: int, heads: int) -> Memory:
        return _clusters.memory_of(self, rows, heads)

    def ingest(self, losers: Losers, centroids: Block, memory: Memory) -> tuple[Block, Memory]:
        return _clusters.ingest(self, losers, centroids, memory)
