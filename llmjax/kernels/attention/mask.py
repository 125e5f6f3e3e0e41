"""Who sees whom: the one rule of all forms."""

from __future__ import annotations

from llmjax.typing import Array

MASKED = -1e30


def attention_mask(q_segments_BT, k_segments_BS, q_slots_T, k_slots_S, window: int | Array | None = None) -> Array:
    """[B, T, S] bool: keys of the query's own segment whose slot is not later and less than `window` slots back.

    window: an int, a traced scalar in a scan over layers, or None for no bound.
    """
    distance_TS = q_slots_T[:, None] - k_slots_S[None, :]
    seen_TS = distance_TS >= 0
    if window is not None:
        seen_TS &= distance_TS < window
    return seen_TS & (q_segments_BT[:, :, None] == k_segments_BS[:, None, :])
