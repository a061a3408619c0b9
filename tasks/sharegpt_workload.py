"""ShareGPT as a workload: the lengths of real conversations.

``lengths=sampled`` is the rule of vLLM's benchmark (``benchmark_serving.py``, now ``vllm bench serve``): conversations
of two turns or more, shuffled with the seed; the prompt is turn 0, as many tokens are generated as turn 1 has; too
short and too long ones are dropped. With the whole file and the same tokenizer the requests are the ones that vLLM
draws with that seed. ``lengths=fixed`` is the shape that the KIVI and MiniCache papers made of ShareGPT: 161 tokens in,
338 out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..conf.errors import InputError
from ..conf.options import PositiveInt
from .base import Source
from .sharegpt import ShareGPT
from .sharegpt_file import Conversations, load
from .workload import NewTokens, Request, Workload, random_tokens

MIN_TOKENS, MAX_PROMPT_TOKENS, MAX_TOTAL_TOKENS = 4, 1024, 2048
"""vLLM's limits: shortest prompt and answer, longest prompt, and largest sum of both."""


@dataclass
class ShareGPTWorkload(Workload):
    """Requests with the lengths of ShareGPT conversations.

    Attributes:
        data_dir: the JSON file, or the folder that holds it; None for the hub, at a pinned revision.
        limit: number of conversations.
        lengths: ``sampled`` or ``fixed``, see the module docstring.
        prompt_tokens, new_tokens: the shape of ``fixed``.
    """

    id: ClassVar[str] = "ShareGPTWorkload"
    name = "sharegpt"
    location_fields = ("data_dir",)

    data_dir: str | None = None
    limit: PositiveInt = 16
    lengths: Literal["sampled", "fixed"] = "sampled"
    prompt_tokens: PositiveInt = 161
    new_tokens: NewTokens = 338

    def __post_init__(self) -> None:
        super().__post_init__()
        self._loaded: tuple[Source, Conversations] | None = None

    def identity(self) -> dict[str, Any]:
        """See :meth:`.Workload.identity`; the shape is left out if it has no influence.

        Recorded under the class that the task and the workload had in common.
        """
        identity = super().identity() | {"class": ShareGPT.id}
        if self.lengths == "sampled":
            del identity["prompt_tokens"], identity["new_tokens"]
        return identity

    def source(self) -> Source:
        """The file's source (:func:`.sharegpt_file.load`), or ``sharegpt-161+338`` for the fixed shape without a file.

        Raises:
            InputError: the file cannot be used.
        """
        if self.lengths == "fixed":
            name = f"{self.name}-{self.prompt_tokens}+{self.new_tokens}"
            return Source(name=name, location="random token ids", revision=None, sha256={})
        return self._load()[0]

    def requests(self, tokenizer: Any, vocab_size: int, seed: int, count: int) -> list[Request]:
        """``workload.limit`` requests whatever ``count`` is; see :meth:`.Workload.requests`.

        Ids of sampled requests are the conversations' own. Tokens are counted as vLLM counts them: with the special
        tokens that the tokenizer puts round a text, and without a chat template.

        Raises:
            InputError: sampled lengths without a tokenizer, or fewer than ``limit`` conversations within vLLM's limits.
        """
        if self.lengths == "fixed":
            return [
                Request(f"fixed-{i}", random_tokens(self.prompt_tokens, vocab_size, seed, i), self.new_tokens)
                for i in range(self.limit)
            ]
        if tokenizer is None:
            alternatives = "workload.lengths=fixed, workload=shape workload.tokens=random or another model"
            allowed = f"this model has no tokenizer; use {alternatives}"
            raise InputError("workload.lengths", self.lengths, allowed)
        conversations = self._load()[1]
        order = [index for index, turns in enumerate(conversations.turns) if turns >= 2]
        random.Random(seed).shuffle(order)
        requests: dict[str, Request] = {}
        for index in order:
            if len(requests) == self.limit:
                break
            identifier, question, answer = conversations.read(index)
            prompt, new_tokens = _ids(tokenizer, question), len(_ids(tokenizer, answer))
            if (
                min(len(prompt), new_tokens) < MIN_TOKENS
                or len(prompt) > MAX_PROMPT_TOKENS
                or len(prompt) + new_tokens > MAX_TOTAL_TOKENS
            ):
                continue
            if identifier in requests:
                identifier += f":{index}"
            requests[identifier] = Request(identifier, tuple(prompt), new_tokens)
        if len(requests) < self.limit:
            allowed = (
                f"only {len(requests)} of {len(order)} conversations of two turns or more are within vLLM's limits "
                f"({conversations.path.name} has {len(conversations.turns)} conversations)"
            )
            raise InputError("workload.limit", self.limit, allowed)
        return list(requests.values())

    def _load(self) -> tuple[Source, Conversations]:
        if self._loaded is None:
            self._loaded = load(self.data_dir, "workload")
        return self._loaded


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, truncation=False, verbose=False).input_ids)
