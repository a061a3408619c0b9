"""Which policies and storages work together."""

from __future__ import annotations

from collections.abc import Sequence

from ...conf.errors import InputError, require
from ..policies.policy import CachePolicy
from ..storage.base import Storage
from ..storage.dense import Dense, LatentLayer


def check_storage(method: str, policy: CachePolicy, storage: Storage) -> None:
    """Reject a storage that does not work with the tokens that a policy keeps.

    Args:
        method: Name of the method.
        policy, storage: Parts of the method.

    Raises:
        InputError: They do not work together.
    """
    keeps, stored = policy.capabilities, storage.capabilities
    drops = keeps.evicts_while_decoding or keeps.drops_stored
    when = "while decoding" if keeps.evicts_while_decoding else "once all layers have seen the prompt"
    problem = None
    if stored.requires_same_tokens_across_layers and not keeps.keeps_everything:
        problem = f"shares tokens between layers, and under method={method} each layer keeps its own; use method=full"
    elif stored.counts_positions and not keeps.keeps_everything:
        problem = (
            f"rotates keys by the number of tokens before them, and method={method} drops some; use method=full or "
            "method/storage=turboquant"
        )
    elif keeps.merges_values and not stored.adds_to_values:
        problem = (
            f"cannot change the values that it holds, and method={method} as configured adds those of evicted tokens "
            "to them; use method/storage=dense"
        )
    elif drops and stored.reads_part:
        problem = (
            f"reads a part of the tokens, and method={method} as configured lets tokens leave {when} by the attention "
            "over all of them; use method/storage=dense or ragged, or method/schedule=after_prefill"
        )
    elif drops and not stored.keeps_stored:
        problem = (
            f"holds rounded tokens, and method={method} as configured lets tokens leave {when}, which would round the "
            "others again; use method/storage=dense, ragged, fp8 or turboquant, or method/schedule=after_prefill"
        )
    elif keeps.heads_part and not stored.separates_heads:
        problem = (
            f"pads all heads of a layer to the longest, and under method={method} as configured some heads grow and "
            "others do not; use method/storage=ragged"
        )
    elif keeps.prefills_by_steps and stored.fits_prompt:
        problem = (
            f"computes its constants from the complete prompt, and method={method} as configured prefills token by "
            "token; use method.policy.mode=prefill_evict, or a storage without such constants"
        )
    if problem is not None:
        raise InputError("method/storage", storage.name, problem)


def latent_layers(method: str, policy: CachePolicy, storage: Storage, num_layers: int) -> Sequence[LatentLayer]:
    """Return empty storage for the layers of a model that caches latents (:mod:`..sharing.mla`), for one batch.

    Raises:
        InputError: The storage represents keys and values apart, or the policy changes values alone.
    """
    problem = "stores keys and values apart, and in latent attention the values are channels of the keys; use dense"
    require(type(storage) is Dense, "method/storage", storage.name, problem)
    problem = "changes stored values, and in latent attention they are channels of the keys; use another method"
    require(not policy.capabilities.merges_values, "method", method, problem)
    return [LatentLayer() for _ in range(num_layers)]
