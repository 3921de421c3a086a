"""Named recipes that merge.

MP-KVM (Xq199911/npm) as its code has it: `mp_kvm_published` is the clustering of its main results,
`mp_kvm_aggregator` the settings of its GPU aggregator, in which centroids wait to be merged, and
`mp_kvm_ema` the update of a later commit.

Deviation: that aggregator flushes to a manager on the CPU once there are more than 256 of its 512
centroids, or at every 100th addition. Here so many centroids may wait beyond `max_centroids`, on the
device, and the interval counts tokens.
"""

from __future__ import annotations

from kvloom.core.registry import preset


def _mp_kvm(centroids: int, more: str = "") -> str:
    return (
        f"mp_kvm(window_size=4096, sinks=0, max_centroids={centroids}, similarity_threshold=0.8, "
        f"per_head_clustering=False, positions='positionless', max_injected_centroids=256{more})"
    )


preset("mp_kvm_published", _mp_kvm(1024))
preset("mp_kvm_aggregator", _mp_kvm(512, ", flush_threshold=256, flush_interval=100"))
preset("mp_kvm_ema", _mp_kvm(1024, ", update='ema', ema=0.99"))
