"""ShareGPT: replies to real conversations, compared with the full cache's.

The model replies to the first turns, and a reply is compared with the one that the same model gives with the full
cache: there is no right answer, but a method that loses nothing changes nothing. For ``runner=efficiency`` see
:mod:`.sharegpt_workload`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..conf.errors import require
from ..conf.options import PositiveInt
from .base import Example, Reply, Source, Task, prompt_tokens, require_fit
from .longbench_metrics import rouge
from .sharegpt_file import Conversations, load

PROMPT_CHARACTERS = (16, 4096)
"""Shortest and longest first turn that is replied to. Not in tokens, so that every model gets the same prompts."""


@dataclass
class ShareGPT(Task):
    """Replies to ShareGPT conversations.

    Attributes:
        data_dir: the JSON file, or the folder that holds it; None for the hub, at a pinned revision.
        limit: number of conversations.
        max_new_tokens: largest number of tokens of a reply.
        metric: ``prefix``: share of the reply before it differs from the full cache's. ``tokens``: share of positions
            with the same token. ``rouge``: ROUGE-L F of the two texts. Every sample has all three.
        chat: use the model's chat template.
        seed: seed of the choice of conversations.
        max_length: prompt tokens that the model may be given; a longer prompt is an error.
    """

    id: ClassVar[str] = "ShareGPT"
    name = "sharegpt"
    location_fields = ("data_dir",)
    compares = True

    data_dir: str | None = None
    limit: PositiveInt = 16
    max_new_tokens: PositiveInt = 256
    metric: Literal["prefix", "tokens", "rouge"] = "prefix"
    chat: bool = True
    seed: int = 0
    max_length: PositiveInt | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._loaded: tuple[Source, Conversations] | None = None

    def identity(self) -> dict[str, Any]:
        """See :meth:`.Task.identity`; ``lengths`` is from the time when this class was the workload too."""
        identity = super().identity() | {"lengths": "sampled"}
        return {key: value for key, value in identity.items() if key not in self.scoring()}

    def source(self) -> Source:
        """See :func:`.sharegpt_file.load`."""
        return self._load()[0]

    def scoring(self) -> dict[str, Any]:
        keys = ("max_new_tokens", "metric", "chat", "seed", "max_length")
        return {key: getattr(self, key) for key in keys}

    def examples(self) -> list[Example]:
        """The first turns of ``limit`` conversations of two turns or more, drawn with ``seed``.

        Raises:
            InputError: there are fewer conversations with a first turn of usual length.
        """
        conversations = self._load()[1]
        order = [index for index, turns in enumerate(conversations.turns) if turns >= 2]
        random.Random(f"replies {self.seed}").shuffle(order)
        examples: dict[str, Example] = {}
        for index in order:
            if len(examples) == self.limit:
                break
            identifier, question, _ = conversations.read(index)
            if PROMPT_CHARACTERS[0] <= len(question.strip()) <= PROMPT_CHARACTERS[1]:
                identifier += f":{index}" if identifier in examples else ""
                examples[identifier] = Example(
                    self.name, identifier, question, (), self.max_new_tokens, self.chat, meta={"row": index}
                )
        allowed = f"only {len(examples)} conversations have a first turn of {PROMPT_CHARACTERS[0]} to "
        allowed += f"{PROMPT_CHARACTERS[1]} characters and a second one"
        require(len(examples) == self.limit, "task.limit", self.limit, allowed)
        return list(examples.values())

    def encode(self, example: Example, tokenizer: Any, max_length: int | None) -> list[int]:
        ids = prompt_tokens(example.prompt, tokenizer, example.chat)
        require_fit(ids, self.limit_of(max_length), example)
        return ids

    def judge(self, example: Example, prediction: Any, reply: Reply | None, reference: Reply | None) -> dict[str, Any]:
        """How far a reply goes with the full cache's: all three metrics, and tokens before they part."""
        assert reply is not None and reference is not None
        longest = max(len(reply.tokens), len(reference.tokens))
        same = [a == b for a, b in zip(reply.tokens, reference.tokens, strict=False)]
        together = same.index(False) if False in same else len(same)
        metrics = {
            "prefix": together / longest if longest else 1.0,
            "tokens": sum(same) / longest if longest else 1.0,
            "rouge": 1.0 if reply.text == reference.text else rouge(reply.text, reference.text),
        }
        return {
            "score": metrics[self.metric],
            **{key: value for key, value in metrics.items() if key != self.metric},
            "tokens_together": together,
            "reference_tokens": len(reference.tokens),
        }

    def _load(self) -> tuple[Source, Conversations]:
        if self._loaded is None:
            self._loaded = load(self.data_dir, "task")
        return self._loaded
