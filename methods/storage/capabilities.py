"""Properties of a storage that the cache depends on, declared in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StorageCapabilities:
    """Properties of a storage that the cache depends on.

    Attributes:
        lossless: Values are read back bit for bit as they were written.
        rounds_once: Each token is rounded by itself when it is appended, and a stored token never changes.
        fits_prompt: Constants of the storage are computed from the complete prompt.
        counts_positions: A token's position in the text is taken to be the number of tokens stored before it.
        adds_to_values: Stored values can be changed by :meth:`.base.LayerStorage.add_to_values`.
        reads_part: A decode step reads some of the tokens only, so several tokens at once are not equivalent to steps.
        needs: What the storage needs beyond a model and a prompt, shown when a run starts and recorded; empty: nothing.
        separates_heads: Heads of different lengths are stored without padding.
        requires_same_tokens_across_layers: Layers share storage, so all of them must keep the same tokens.
        padding_bytes: Maximum bytes of a layer beyond the formula, because codes are packed in whole units.
    """

    lossless: bool = False
    rounds_once: bool = False
    fits_prompt: bool = False
    counts_positions: bool = False
    adds_to_values: bool = False
    reads_part: bool = False
    needs: str = ""
    separates_heads: bool = False
    requires_same_tokens_across_layers: bool = False
    padding_bytes: int = 0

    @property
    def keeps_stored(self) -> bool:
        """Whether stored tokens never change, so that others can leave at any time."""
        return self.lossless or self.rounds_once
