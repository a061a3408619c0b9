"""RULER: what stands in the prompts, how long they are, what scores, and what is refused."""

import ast
import gzip
import hashlib
import importlib.util
import json
import re
from collections import Counter
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from local_model import kvbench, save_local_model
from omegaconf import OmegaConf
from test_needle import Words, smollm2_tokenizer

from kvbench.conf.errors import InputError
from kvbench.tasks.base import Example, question_length
from kvbench.tasks.needle import CONTEXT
from kvbench.tasks.ruler import EXAMPLES, FAMILIES, FILES, NOISE, Ruler, _distinct, _words

REPOSITORY = Path(__file__).resolve().parents[2]
YAML = REPOSITORY / "conf" / "task" / "ruler.yaml"
DATA_DIR = REPOSITORY / "tasks" / "data" / "ruler"
HAYSTACK = (REPOSITORY / "tasks" / "data" / "needle" / "haystack.txt").read_text(encoding="utf-8").split()

WORD, NUMBER, UUID = (
    r"[\w' -]+-[\w' -]+",  # tam-o'-shanter
    r"[1-9]\d{6}",
    r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
)
NIAH = {
    # haystack, key, value, keys, values of each, keys asked for
    "niah_single_1": ("noise", WORD, NUMBER, 1, 1, 1),
    "niah_single_2": ("essay", WORD, NUMBER, 1, 1, 1),
    "niah_single_3": ("essay", WORD, UUID, 1, 1, 1),
    "niah_multikey_1": ("essay", WORD, NUMBER, 4, 1, 1),
    "niah_multikey_2": ("needle", WORD, NUMBER, None, 1, 1),
    "niah_multikey_3": ("needle", UUID, UUID, None, 1, 1),
    "niah_multivalue": ("essay", WORD, NUMBER, 1, 4, 1),
    "niah_multiquery": ("essay", WORD, NUMBER, 4, 1, 4),
}
GENERATED = (*NIAH, "vt", "cwe", "fwe")
LENGTHS = (1500, 4096)
"""Below 4096 the words of cwe come less often."""


@pytest.fixture(params=["words", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return Words() if request.param == "words" else smollm2_tokenizer()


def text_of(task: Ruler, example: Example, tokenizer: Any) -> str:
    return tokenizer.decode(task.encode(example, tokenizer, None))


def context_of(task: Ruler, example: Example, tokenizer: Any) -> str:
    """What stands in the place of the context."""
    text = text_of(task, example, tokenizer)
    head, tail = example.prompt.split(CONTEXT)
    assert text.count(head) == 1
    return text[text.index(head) + len(head) : text.rindex(tail)]


def made(name: str, length: int, tokenizer: Any, limit: int = 2, **keys: Any) -> list[tuple[Example, str]]:
    task = Ruler(datasets=[name], lengths=[length], limit=limit, **keys)
    return [(example, context_of(task, example, tokenizer)) for example in task.examples()]


def refused(**keys: Any) -> str:
    """The one line that the user sees."""

    def use() -> None:
        task = Ruler(**keys)
        task.source()
        task.examples()

    with pytest.raises(InputError) as error:
        use()
    assert "\n" not in str(error.value)
    return str(error.value)


def not_encoded(most: int | None = None, **keys: Any) -> str:
    task = Ruler(**keys)
    example = task.examples()[0]
    with pytest.raises(InputError) as error:
        task.encode(example, Words(), most)
    assert "\n" not in str(error.value)
    return str(error.value)


def written(folder: Path, name: str, content: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    data = content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content))
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


# --- what there is ----------------------------------------------------------------------------------------------------


def test_the_yaml_holds_every_key_at_its_default() -> None:
    config = OmegaConf.to_container(OmegaConf.load(YAML))
    assert isinstance(config, dict)
    assert config.pop("_target_") == "kvbench.tasks.ruler.Ruler"
    assert Ruler(**config).identity() == Ruler().identity()  # type: ignore[arg-type]
    assert set(config) == {f.name for f in fields(Ruler)}


def test_the_13_tasks_and_their_tokens_to_generate() -> None:
    tokens = dict.fromkeys(NIAH, 128) | {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    assert {name: family.max_new_tokens for name, family in FAMILIES.items()} == tokens
    assert len(tokens) == 13


def test_data_sets_are_tasks_at_lengths() -> None:
    task = Ruler(datasets="vt, fwe", lengths=[4096, 900], limit=2)
    names = [(e.dataset, e.id) for e in task.examples()]
    assert names == [(f"{t}-{n}", i) for n in (4096, 900) for t in ("vt", "fwe") for i in ("000", "001")]
    assert {task.group(e) for e in task.examples()} == {"vt-4096", "fwe-4096", "vt-900", "fwe-900"}
    assert len(Ruler(datasets=["fwe"]).examples()) == EXAMPLES == 500
    assert {e.meta["task"] for e in Ruler(limit=1).examples()} == set(GENERATED)


def test_the_mean_at_each_length_is_reported() -> None:
    task = Ruler(datasets=["vt", "fwe"], lengths=[4096, 900])
    groups = ["vt-4096", "fwe-4096", "vt-900", "fwe-900"]
    assert task.averages(groups) == {"mean at 4096": groups[:2], "mean at 900": groups[2:]}
    assert Ruler(datasets=["vt", "fwe"]).averages(groups[:2]) == {}
    assert Ruler(datasets=["vt"], lengths=[4096, 900]).averages(["vt-4096", "vt-900"]) == {}


@pytest.mark.parametrize("name", GENERATED)
def test_an_example_depends_on_seed_task_length_and_number_alone(name: str) -> None:
    """Else a score of one selection could not stand beside that of another."""
    few = Ruler(datasets=[name], lengths=[1500], limit=2)
    many = Ruler(datasets=[*GENERATED[::-1]], lengths=[900, 1500], limit=3)
    here, there = few.examples(), [e for e in many.examples() if e.dataset == f"{name}-1500"]
    assert here == there[:2]
    tokenizer = Words()
    ids = [few.encode(e, tokenizer, None) for e in here]
    assert ids == [many.encode(e, tokenizer, None) for e in there[1::-1]][::-1]
    other = Ruler(datasets=[name], lengths=[1500], limit=2, seed=1).examples()
    texts = {text_of(few, e, tokenizer) for e in (*there, *other)}
    assert len(texts) == 5
    assert len({e.answers for e in (*there, *other)}) == 5


def test_the_generator_makes_what_it_made() -> None:
    """A change of anything that is drawn must be meant: old scores are then of other data."""
    task, digest = Ruler(lengths=[1500], limit=2, chat=False), hashlib.sha256()
    tokenizer = Words()
    for example in task.examples():
        digest.update(f"{example.answers} {text_of(task, example, tokenizer)}".encode())
    assert digest.hexdigest()[:16] == "b9ce0c81e8a5755d"


# --- lengths ----------------------------------------------------------------------------------------------------------


def units(name: str, context: str) -> int:
    """How many units of haystack a context has, counted without the code that made it (fwe: cannot be read off)."""
    needles = len(re.findall("One of the special magic", context))
    if name in NIAH:
        kind = NIAH[name][0]
        return len(without_needles(context).split()) if kind == "essay" else context.count("\n") + 1 - 1
    assert needles == 0
    if name == "vt":
        return context.count(NOISE)
    return len(set(listed(context)))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", GENERATED)
def test_a_prompt_fills_its_length_to_the_unit(name: str, length: int, tokenizer: Any) -> None:
    task = Ruler(datasets=[name], lengths=[length], limit=2)
    for example in task.examples():
        room = length - example.max_new_tokens
        ids = task.encode(example, tokenizer, room)
        assert len(ids) <= room
        filling, context = FAMILIES[name].filling(task, example), context_of(task, example, tokenizer)
        n = next(n for n in range(length) if filling.text(n) == context) if name == "fwe" else units(name, context)
        while filling.text(n + 1) == context:  # one coded word more in all may be none of any
            n += 1
        assert filling.text(n) == context
        more = tokenizer.decode(ids).replace(context, filling.text(n + 1))
        assert len(tokenizer(more, add_special_tokens=False).input_ids) > room


def test_lengths_that_differ_by_a_token_are_all_filled() -> None:
    """The search ends at the right unit wherever the border lies."""
    tokenizer, line = Words(), len(re.findall(r"\s?\w+|[^\w\s]|\s", f"\n{NOISE}"))
    task = Ruler(datasets=["niah_single_1"], lengths=list(range(700, 730)), limit=1)
    for example in task.examples():
        left = example.meta["length"] - 128 - len(task.encode(example, tokenizer, None))
        assert 0 <= left < line


def test_long_prompts_take_few_looks_at_the_tokenizer() -> None:
    task, tokenizer = Ruler(lengths=[16384], limit=1), smollm2_tokenizer()

    class Counted:
        chat_template = tokenizer.chat_template
        apply_chat_template = tokenizer.apply_chat_template
        calls = 0
        tokens = 0

        def __call__(self, *args: Any, **keys: Any) -> Any:
            result = tokenizer(*args, **keys)
            self.calls, self.tokens = self.calls + 1, self.tokens + len(result.input_ids)
            return result

    for example in task.examples():
        counted = Counted()
        tokens = len(task.encode(example, counted, None)) + example.max_new_tokens
        assert 16384 - 80 < tokens <= 16384
        assert counted.calls <= 14, example.dataset
        assert counted.tokens <= 10 * 16384, example.dataset


def test_a_tokenizer_that_finds_nothing_does_not_hang() -> None:
    class Nothing(Words):
        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
            return replace_ids(super().__call__(text[:5]), [])

    def replace_ids(result: Any, ids: list[int]) -> Any:
        result.input_ids = ids
        return result

    task = Ruler(datasets=["niah_single_1"], lengths=[300], limit=1)
    assert task.encode(task.examples()[0], Nothing(), None) == []


# --- the text around the context --------------------------------------------------------------------------------------


def literals(name: str) -> dict[str, Any]:
    """Constants at the top of a file of lm-eval's port, read without running it."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        pytest.skip("lm-eval is not installed (pip install kvbench[eval]); its templates are what is compared with")
    tree = ast.parse((Path(spec.origin).parent / "tasks" / "ruler" / f"{name}.py").read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


def test_the_templates_are_those_of_another_port() -> None:
    assert FAMILIES["niah_single_1"].template.replace("{kind}", "{type_needle_v}") == literals("niah_utils")["TEMPLATE"]
    for name, module in (("vt", "vt_utils"), ("cwe", "cwe_utils"), ("fwe", "fwe_utils"), ("qa_1", "qa_utils")):
        config = literals(module)["CONFIG"]
        config = config.get("variable_tracking", config)
        family: Any = FAMILIES[name]
        assert family.template == config["template"], name
        assert family.prefix.strip() == config["answer_prefix"].strip(), name
        assert family.max_new_tokens == config["tokens_to_generate"], name


def test_one_answer_is_asked_for_in_the_singular() -> None:
    examples = {e.meta["task"]: e for e in Ruler(limit=1).examples()}
    one, four = examples["niah_single_3"], examples["niah_multiquery"]
    key, keys = one.meta["keys"][0], re.findall(r"for (.+) mentioned", four.prompt)[0]
    head = "is hidden within the following text. Make sure to memorize it. I will quiz you about the"
    assert one.prompt == (
        f"A special magic uuid {head} uuid afterwards.\n{CONTEXT}\nWhat is the special magic uuid for {key} mentioned "
        "in the provided text?"
    )
    assert one.meta["answer_prefix"] == f" The special magic uuid for {key} mentioned in the provided text is"
    assert four.prompt.startswith("Some special magic numbers are hidden within the following text.")
    assert f"What are all the special magic numbers for {keys} mentioned" in four.prompt
    assert re.fullmatch(rf"{WORD}, {WORD}, {WORD}, and {WORD}", keys)
    assert four.meta["answer_prefix"] == f" The special magic numbers for {keys} mentioned in the provided text are"


@pytest.mark.parametrize("name", GENERATED)
def test_the_answer_prefix_stands_behind_the_chat_template(name: str, tokenizer: Any) -> None:
    task = Ruler(datasets=[name], lengths=[1500], limit=1)
    example = task.examples()[0]
    prefix, turn = example.meta["answer_prefix"], tokenizer.apply_chat_template
    wrapped = turn([{"role": "user", "content": "<<>>"}], tokenize=False, add_generation_prompt=True)
    before, behind = wrapped.split("<<>>")
    text = text_of(task, example, tokenizer)
    assert text.startswith(before + example.prompt.split(CONTEXT)[0])
    assert text.endswith(example.question + behind + prefix)
    assert text.count(behind) == 1
    plain = Ruler(datasets=[name], lengths=[1500], limit=1, chat=False)
    text = text_of(plain, plain.examples()[0], tokenizer)
    assert behind not in text
    assert text.removeprefix("<s>").startswith(example.prompt.split(CONTEXT)[0])
    assert text.endswith(example.question + prefix)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", GENERATED)
def test_the_question_is_all_behind_the_context(name: str, chat: bool, tokenizer: Any) -> None:
    """A method that compresses before the question must see none of it, and all of the context."""
    task = Ruler(datasets=[name], lengths=[1500], limit=1, chat=chat)
    example = task.examples()[0]
    ids = task.encode(example, tokenizer, None)
    assert example.prompt.endswith(CONTEXT + example.question)
    count = question_length(ids, example.question, tokenizer)
    read, asked = tokenizer.decode(ids[:-count]), tokenizer.decode(ids[-count:])
    assert example.question.strip() in asked
    assert asked.endswith(example.meta["answer_prefix"])
    end = context_of(task, example, tokenizer).rstrip()[-20:]
    assert read.rstrip().endswith(end.rstrip(".")) or read.rstrip().endswith(end)


# --- retrieval --------------------------------------------------------------------------------------------------------

SENTENCE = re.compile(rf"One of the special magic (\w+) for ({UUID}|{WORD}) is: ({UUID}|{NUMBER})\.")


def without_needles(context: str) -> str:
    return " ".join(SENTENCE.sub("", context).split())


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", NIAH)
def test_the_needles_answer_the_question_and_nothing_else_does(name: str, length: int, tokenizer: Any) -> None:
    haystack, key, value, keys, each, queries = NIAH[name]
    for example, context in made(name, length, tokenizer):
        found: dict[str, list[str]] = {}
        for kind, k, v in SENTENCE.findall(context):
            assert kind == {NUMBER: "numbers", UUID: "uuids"}[value]
            assert re.fullmatch(key, k) and re.fullmatch(value, v)
            found.setdefault(k, []).append(v)
        if keys is None:
            keys_here = context.count("\n") + 1
            assert context.count("One of the special") == keys_here > 10, "the haystack is needles"
        else:
            keys_here = keys
        assert len(found) == keys_here, "no key stands for two"
        assert {len(values) for values in found.values()} == {each}
        assert len({v for values in found.values() for v in values}) == keys_here * each
        asked = re.findall(r"for (.+) mentioned in the provided text\?", example.question)[0].replace(", and ", ", ")
        names = asked.split(", ")
        assert len(names) == queries
        assert sorted(example.answers) == sorted(v for k in names for v in found[k])
        assert [v for v in example.answers if v in found[names[0]]] == list(example.answers[:each]), (
            "in the order asked"
        )
        rest = without_needles(context)
        if haystack == "noise":
            assert set(SENTENCE.sub("", context).split("\n")) == {NOISE, ""}
        if haystack == "essay":
            assert rest.split() == HAYSTACK[: len(rest.split())]
            parts = [part.strip() for part in SENTENCE.split(context)[::4]]
            for i, part in enumerate(parts):
                # Behind the last word, where the text is cut, a needle stands whether or not a sentence ends there.
                assert part == "" or part[-1] in ".?!" or not any(parts[i + 1 :])


def test_nothing_is_drawn_twice() -> None:
    """A key of two needles would have two answers; among thousands of words it would happen."""
    drawn = iter("abbacbada")
    assert "".join(islice(_distinct(lambda: next(drawn), taken="a"), 3)) == "bcd"
    task = Ruler(datasets=["niah_multikey_2"], limit=1)
    (example,) = task.examples()

    def haystack(meta: dict[str, Any], answers: tuple[str, ...]) -> list[tuple[str, str, str]]:
        changed = replace(example, meta={**example.meta, **meta}, answers=answers)
        text = FAMILIES["niah_multikey_2"].filling(task, changed).text(50)
        return [parts for parts in SENTENCE.findall(text) if parts[1] not in example.meta["keys"]]

    (_, key, value), *_ = haystack({}, example.answers)
    assert key not in {k for _, k, _ in haystack({"keys": (key, *example.meta["keys"])}, example.answers)}
    assert value not in {v for _, _, v in haystack({}, (value,))}


def test_needles_stand_in_any_order() -> None:
    """Were the one asked for always the first, its place would give it away."""
    places = Counter()
    for example, context in made("niah_multikey_1", 1500, Words(), limit=40):
        values = [value for _, _, value in SENTENCE.findall(context)]
        places[values.index(example.answers[0])] += 1
    assert set(places) == {0, 1, 2, 3} and max(places.values()) < 20


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_2", "niah_multikey_3"])
def test_needles_stand_at_every_depth(name: str) -> None:
    """One needle is asked for; over examples it is as often in the first quarter as in the last."""
    places = []
    for example, context in made(name, 1500, Words(), limit=60):
        (answer,) = example.answers
        places.append(context.index(answer) / len(context))
    quarters = Counter(min(int(4 * place), 3) for place in places)
    assert set(quarters) == {0, 1, 2, 3}
    assert min(quarters.values()) >= 5
    assert 0.4 < fmean(places) < 0.6


def test_several_needles_of_one_prompt_stand_apart() -> None:
    spread = []
    for example, context in made("niah_multivalue", 4096, Words(), limit=20):
        places = sorted(context.index(value) / len(context) for value in example.answers)
        spread.append(places[-1] - places[0])
    assert fmean(spread) > 0.4, "four of 40 depths, none twice"


def test_a_needle_stands_at_the_percent_of_sentences_drawn_for_it() -> None:
    for example, context in made("niah_single_2", 4096, Words(), limit=10):
        before, behind = (re.split(r"(?<=[.?!])\s+", part.strip()) for part in SENTENCE.split(context)[::4])
        counts = [len([part for part in parts if part]) for parts in (before, behind)]
        assert counts[0] == sum(counts) * example.meta["depths"][0] // 100


def test_a_short_haystack_begins_anew(tmp_path: Path) -> None:
    words = [f"w{i}" + "." * (i % 7 == 6) for i in range(49)]
    hay = written(tmp_path, "hay.txt", " ".join(words))
    task = Ruler(datasets=["niah_single_2"], lengths=[600], limit=3, haystack=hay)
    for example in task.examples():
        text = without_needles(context_of(task, example, Words())).split()
        assert text == (words * 20)[: len(text)] and len(text) > 98
    assert "The haystack has only 192 characters and is repeated" in task.source().note


# --- the generator's own items ----------------------------------------------------------------------------------------

LINE = re.compile(rf"One of the special magic uuids for ({UUID}) is: ({UUID})\.\n")


@pytest.fixture(scope="module")
def real(shared_data: Path) -> list[dict[str, Any]]:
    path = shared_data / "ruler" / "niah_multikey_3_4096.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"the generator's own niah_multikey_3 is not at {path}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def skeleton(prompt: str) -> str:
    """The prompt with every uuid and every line of haystack made alike."""
    return re.sub(UUID, "<uuid>", re.sub(f"(?:{LINE.pattern})+", "<lines>", prompt))


def test_niah_multikey_3_has_the_form_of_the_generators_items(real: list[dict[str, Any]]) -> None:
    assert len(real) == 500
    (form,) = {skeleton(item["input"]) for item in real}
    task, tokenizer = Ruler(datasets=["niah_multikey_3"], limit=5, chat=False), smollm2_tokenizer()
    for example in task.examples():
        assert skeleton(text_of(task, example, tokenizer)) == form
    for item in real:
        found = dict(LINE.findall(item["input"]))
        key = re.findall(rf"What is the special magic uuid for ({UUID}) ", item["input"])[0]
        assert [found[key]] == item["outputs"]


def test_niah_multikey_3_has_as_many_needles_as_the_generators_items(real: list[dict[str, Any]]) -> None:
    """Ours fill a length to the line, the generator goes in steps of 25 lines and adds the needle."""
    tokenizer = smollm2_tokenizer()
    for item in real[:3]:
        assert len(LINE.findall(item["input"])) == 51
        line = (item["length"] - 128) / 51.5  # by the generator's tokenizer; the text around is about half a line
        assert 25 * int((4096 - 128) / line / 25) + 1 == 51
        tokens = len(tokenizer(item["input"]).input_ids) + 128
        task = Ruler(datasets=["niah_multikey_3"], lengths=[tokens], limit=3, chat=False)
        for example in task.examples():
            assert len(LINE.findall(text_of(task, example, tokenizer))) in (50, 51, 52)


# --- tracing ----------------------------------------------------------------------------------------------------------


def resolved(text: str) -> tuple[dict[str, str], list[str]]:
    """Values of all variables by running the assignments in the order of the text, and each one's form."""
    values: dict[str, str] = {}
    forms = []
    for name, source in re.findall(r"VAR ([A-Z]+) = (VAR [A-Z]+|\d+)", text):
        values[name] = values[source[4:]] if source.startswith("VAR") else source
        forms.append("hop" if source.startswith("VAR") else "number")
    return values, forms


@pytest.mark.parametrize("length", LENGTHS)
def test_the_chain_leads_to_the_answers(length: int, tokenizer: Any) -> None:
    for example, context in made("vt", length, tokenizer, limit=4):
        values, forms = resolved(context)
        assert forms == ["number", *["hop"] * 4]
        (wanted,) = re.findall(r"assigned the value (\d{5}) in the text above", example.question)
        assert {name for name, value in values.items() if value == wanted} == set(example.answers)
        assert list(values) == list(example.answers), "in the order of the chain"
        assert all(re.fullmatch("[A-Z]{5}", name) for name in example.answers)
        assert f", 5 variables are assgined the value {wanted}, they are: " in example.meta["answer_prefix"]
        rest = re.sub(r"VAR [A-Z]+ = (VAR [A-Z]+|\d+)", "", context)
        assert {line.strip() for line in rest.split("\n")} == {NOISE, ""}


def test_the_solved_chain_in_front_is_right_and_drawn_anew() -> None:
    heads = [e.prompt.split(CONTEXT)[0] for e in Ruler(datasets=["vt"], limit=5).examples()]
    for head in heads:
        assert head.count("Memorize and track") == 2
        values, forms = resolved(head)
        assert forms == ["number", *["hop"] * 4]
        wanted, names = re.findall(r"assgined the value (\d+), they are:  ([A-Z ]+)\n\n\n\nMemorize", head)[0]
        assert names.split() == [name for name, value in values.items() if value == wanted] == list(values)
        assert all(len(name) == 3 for name in names.split())
    assert len(set(heads)) == 5


def test_the_solved_chain_is_as_long_as_the_generators() -> None:
    """500 tokens hold 10 lines of noise, not 15."""
    tokenizer = smollm2_tokenizer()
    for example in Ruler(datasets=["vt"], limit=5).examples():
        solved = example.prompt.split("\n\n\n\n")[0]
        assert solved.count(NOISE) == 10
        tokens = len(tokenizer(solved).input_ids) + 30
        assert tokens <= 500 < tokens + 5 * len(tokenizer(f" {NOISE}\n").input_ids)


# --- counting ---------------------------------------------------------------------------------------------------------


def listed(context: str) -> list[str]:
    """The words of a numbered list, whose numbers must be 1, 2, 3 ..."""
    parts = re.split(r"(?:^| )(\d+)\. ", context)
    assert parts[0] == ""
    assert parts[1::2] == [str(i + 1) for i in range(len(parts) // 2)]
    return parts[2::2]


@pytest.mark.parametrize(("length", "often", "seldom"), [(1500, 6, 1), (4095, 6, 1), (4096, 30, 3), (8192, 30, 3)])
def test_the_common_words_are_the_most_common(length: int, often: int, seldom: int, tokenizer: Any) -> None:
    for example, context in made("cwe", length, tokenizer):
        counts = Counter(listed(context))
        top = counts.most_common(10)
        assert {word for word, _ in top} == set(example.answers)
        assert {n for _, n in top} == {often}
        assert {n for word, n in counts.items() if word not in example.answers} == {seldom}
        assert set(counts) <= set(_words().all)
        places = [i / len(listed(context)) for i, word in enumerate(listed(context)) if word in example.answers]
        assert 0.3 < fmean(places) < 0.7, "shuffled"


@pytest.mark.parametrize(("length", "words", "often", "seldom"), [(1500, 20, 3, 1), (4096, 40, 10, 3)])
def test_the_solved_list_in_front_is_right(length: int, words: int, often: int, seldom: int) -> None:
    heads = [e.prompt.split(CONTEXT)[0] for e in Ruler(datasets=["cwe"], lengths=[length], limit=3).examples()]
    for head in heads:
        given, answers = re.findall(
            r"appear most often\.\n(1\. .+)\nQuestion: .+ in the list are:(1\. .+)\nBelow is a numbered list", head
        )[0]
        counts = Counter(listed(given))
        assert Counter(counts.values()) == {often: 10, seldom: words - 10}
        assert Counter(listed(answers)) == dict.fromkeys((w for w, n in counts.items() if n == often), 1)
    assert len(set(heads)) == 3


def test_a_list_longer_than_the_word_lists_goes_on_with_pairs() -> None:
    (example, context), *_ = made("cwe", 90_000, Words(), limit=1)
    counts = Counter(listed(context))
    assert len(counts) > len(_words().all) == 8166
    assert {word for word, _ in counts.most_common(10)} == set(example.answers) <= set(_words().all)
    assert set(counts.values()) == {30, 3}


@pytest.mark.parametrize("length", LENGTHS)
def test_the_frequent_words_are_the_most_frequent(length: int, tokenizer: Any) -> None:
    for example, context in made("fwe", length, tokenizer, limit=4):
        counts = Counter(context.split(" "))
        (dots, most), *top, fourth = counts.most_common(5)
        assert dots == "..."
        assert [word for word, _ in top] == list(example.answers)
        assert fourth[1] < top[2][1]
        assert all(re.fullmatch("[a-z]{6}", word) for word in counts if word != "...")
        assert len(counts) <= length // 50
        for k, (_, n) in enumerate(top, 2):
            assert most / k**2 == pytest.approx(n, abs=1), "a zeta distribution with alpha 2"
        assert context.split(" ")[:most] != ["..."] * most, "shuffled"


def test_the_third_word_is_ahead_of_the_fourth_in_the_shortest_prompts() -> None:
    """A tie would have two right answers."""
    shortest = int(re.findall(r"at least (\d+)", not_encoded(datasets=["fwe"], lengths=[100], limit=1))[0])
    tokenizer, task = Words(), Ruler(datasets=["fwe"], lengths=list(range(shortest + 40, shortest + 100)), limit=1)
    for example in task.examples():
        counts = Counter(context_of(task, example, tokenizer).split(" "))
        assert [word for word, _ in counts.most_common(4)][1:] == list(example.answers)
        assert counts.most_common(5)[4][1] < counts[example.answers[2]]


# --- questions --------------------------------------------------------------------------------------------------------


def article(letter: str, paragraphs: int, questions: int = 1, words: int = 30) -> dict[str, Any]:
    """An article in SQuAD's form; each paragraph has so many questions and one that cannot be answered."""

    def answers(text: str) -> list[dict[str, Any]]:
        return [{"text": text, "answer_start": 0}, {"text": text, "answer_start": 0}, {"text": f"the {text}"}]

    made = []
    for p in range(paragraphs):
        qas = [
            {"question": f"{letter}{p} question {q}?", "answers": answers(f"{letter}{p}a{q}"), "is_impossible": False}
            for q in range(questions)
        ]
        qas.append({"question": f"{letter}{p} nothing?", "answers": [], "is_impossible": True})
        made.append({"context": f"{letter}{p} " + "says " * words + "so.", "qas": qas})
    return {"title": letter, "paragraphs": made}


def squad(folder: Path, articles: str = "ABCDE", paragraphs: int = 4) -> str:
    return written(folder, "dev-v2.0.json", {"data": [article(letter, paragraphs) for letter in articles]})


def hotpot(folder: Path, rows: int = 6) -> str:
    content = [
        {
            "question": f"Who is {i}?",
            "answer": f"Person {i}",
            "context": [[f"Title {i}-{j}", [f"First of {i}-{j}.", f" Second of {i}-{j}."]] for j in range(10)],
        }
        for i in range(rows)
    ]
    return written(folder, "hotpot.json", content)


def numbered_documents(context: str) -> list[str]:
    parts = re.split(r"(?:^|\n\n)Document (\d+):\n", context)
    assert parts[1::2] == [str(i + 1) for i in range(len(parts) // 2)]
    return parts[2::2]


def test_a_question_stands_with_its_paragraph_then_its_article_then_others(tmp_path: Path, tokenizer: Any) -> None:
    file = squad(tmp_path, paragraphs=8)
    for length, letters in {400: "A", 900: "ABCDE"}.items():
        places = []
        for i, (example, context) in enumerate(made("qa_1", length, tokenizer, limit=4, squad=file)):
            assert example.question.endswith(f"Question: A{i} question 0?")
            assert example.answers == (f"A{i}a0", f"the A{i}a0")
            assert example.meta["answer_prefix"] == " Answer:"
            documents = numbered_documents(context)
            assert len(set(documents)) == len(documents) > 1
            places.append(next(k for k, text in enumerate(documents) if text.startswith(f"A{i} ")))
            others = Counter(text[0] for text in documents)
            assert set(others) <= set(letters)
            assert len(others) == 1 or others["A"] == 8, "first all of the article"
        assert len(set(places)) > 1, "not always at the same place"


def test_a_prompt_ends_with_the_last_document(tmp_path: Path) -> None:
    task = Ruler(datasets=["qa_1"], lengths=[5000], squad=squad(tmp_path, "AB"), limit=1)
    documents = numbered_documents(context_of(task, task.examples()[0], Words()))
    assert len(set(documents)) == len(documents) == 8
    assert "The documents of qa_1 have only" in task.source().note
    assert "takes all of them" in task.source().note
    assert "documents of" not in Ruler(datasets=["qa_1"], lengths=[100], squad=squad(tmp_path)).source().note


def test_a_document_more_would_be_too_long(tmp_path: Path, tokenizer: Any) -> None:
    document = len(tokenizer("\n\nDocument 88:\nC3 " + "says " * 30 + "so.", add_special_tokens=False).input_ids)
    task = Ruler(datasets=["qa_1"], lengths=list(range(500, 540, 3)), squad=squad(tmp_path), limit=1)
    for example in task.examples():
        left = example.meta["length"] - 32 - len(task.encode(example, tokenizer, None))
        assert 0 <= left <= document


def test_all_ten_paragraphs_of_a_hotpot_question_are_there(tmp_path: Path, tokenizer: Any) -> None:
    examples = made("qa_2", 700, tokenizer, limit=50, hotpot=hotpot(tmp_path))
    assert len(examples) == 6, "no more than the file has"
    for i, (example, context) in enumerate(examples):
        documents = numbered_documents(context)
        own = {f"Title {i}-{j}\nFirst of {i}-{j}. Second of {i}-{j}." for j in range(10)}
        assert own < set(documents) and len(set(documents)) == len(documents)
        assert example.answers == (f"Person {i}",)
        assert example.prompt.endswith(f"\n\nQuestion: Who is {i}?")


def test_questions_that_cannot_be_answered_are_left_out(tmp_path: Path) -> None:
    task = Ruler(datasets=["qa_1"], squad=squad(tmp_path, "AB", paragraphs=3), limit=None)
    assert [e.meta["row"] for e in task.examples()] == list(range(6))
    assert not any("nothing" in e.prompt for e in task.examples())


def test_packed_files_are_read_too(tmp_path: Path) -> None:
    plain = squad(tmp_path)
    packed = written(tmp_path, "dev.json.gz", gzip.compress(Path(plain).read_bytes()))
    one, two = (Ruler(datasets=["qa_1"], squad=path).examples() for path in (plain, packed))
    assert one == two


def test_without_their_files_the_questions_are_left_out(tmp_path: Path) -> None:
    assert "Left out: qa_1 and qa_2, for want of task.squad and task.hotpot." in Ruler().source().note
    one = Ruler(hotpot=hotpot(tmp_path), limit=1)
    assert "Left out: qa_1, for want of task.squad." in one.source().note
    assert {e.meta["task"] for e in one.examples()} == {*GENERATED, "qa_2"}
    both = Ruler(hotpot=hotpot(tmp_path), squad=squad(tmp_path), limit=1)
    assert "Left out" not in both.source().note
    assert [e.meta["task"] for e in both.examples()] == list(FAMILIES)
    assert "Left out" not in Ruler(datasets=["vt"]).source().note
    assert set(FILES) == {"qa_1", "qa_2"}


# --- the score --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "answers", "prediction", "score"),
    [
        ("niah_single_1", ("1234567",), " 1234567.", 1.0),
        ("niah_single_1", ("1234567",), "91234567", 1.0),  # a substring is enough, as in the generator's scorer
        ("niah_single_1", ("1234567",), "1,234,567", 0.0),
        ("niah_single_1", ("1234567",), "", 0.0),
        ("niah_single_3", ("ab12-cd",), "It is AB12-CD", 1.0),
        ("niah_multiquery", ("1", "2", "3", "4"), "1 and 3, and 3 again", 0.5),
        ("niah_multivalue", ("11", "22", "33", "44"), "44, 33, 22 and 11", 1.0),
        ("vt", ("ABCDE", "FGHIJ", "KLMNO", "PQRST", "UVWXY"), "abcde fghij xxxxx", 0.4),
        ("cwe", ("Art", "dog"), "1. party 2. cat", 0.5),
        ("fwe", ("aaaaaa", "bbbbbb", "cccccc"), "AAAAAA, dddddd, cccccc", 2 / 3),
        ("qa_1", ("France", "the France"), "It is france.", 1.0),
        ("qa_1", ("in 1999", "1999"), "1999", 1.0),
        ("qa_2", ("Person 1", "Nobody"), "Somebody", 0.0),
    ],
)
def test_scores(name: str, answers: tuple[str, ...], prediction: str, score: float) -> None:
    """Share of the references; for questions, any of them."""
    example = Example("x", "000", "", answers, max_new_tokens=1, meta={"task": name})
    assert Ruler().score(example, prediction) == pytest.approx(score)


def test_the_references_themselves_score_1_and_the_question_0(tmp_path: Path) -> None:
    task = Ruler(limit=2, squad=squad(tmp_path), hotpot=hotpot(tmp_path))
    for example in task.examples():
        assert task.score(example, ", ".join(example.answers).upper()) == 1.0
        assert task.score(example, example.question + example.meta["answer_prefix"]) == 0.0


# --- the source -------------------------------------------------------------------------------------------------------


def test_the_word_lists_are_the_recorded_ones() -> None:
    readme = (DATA_DIR / "README.md").read_text(encoding="utf-8")
    hashes = Ruler().source().sha256
    for name, count in (("nounlist.txt", 6782), ("adjectivelist.txt", 912), ("verblist.txt", 1042)):
        data = (DATA_DIR / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        assert f"| `{name}` | {count:,} | {digest} |" in readme
        assert hashes[f"words/{name}"] == digest
        assert len(data.decode().splitlines()) == count
    assert "Maxim Rebguns" in (DATA_DIR / "LICENSE").read_text(encoding="utf-8")


def test_the_bundled_haystack_is_said_not_to_be_the_published_one(tmp_path: Path) -> None:
    source = Ruler().source()
    assert source.name == "ruler"
    assert source.note.startswith("The essays are the bundled text, not Paul Graham's: niah_single_2, niah_single_3, ")
    assert "niah_single_1" not in source.note
    assert Ruler(datasets=["vt", "niah_single_1"]).source().note == ""
    hay = written(tmp_path, "mine.txt", "A sentence. " * 5000)
    assert "Paul Graham" not in Ruler(haystack=hay).source().note


def test_the_text_and_not_its_place_is_the_identity(tmp_path: Path) -> None:
    text = "One sentence here. " * 3000
    here, there = written(tmp_path / "a", "hay.txt", text), written(tmp_path / "b", "hay.txt", text)
    other = written(tmp_path / "c", "hay.txt", text + "More.")
    one, same, another = (Ruler(haystack=path) for path in (here, there, other))
    assert one.identity() == same.identity() != another.identity()
    assert one.source().name == f"ruler-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    assert one.source().name != another.source().name
    assert str(tmp_path) not in str(one.identity())
    qa, moved = (Ruler(squad=squad(tmp_path / folder)) for folder in "de")
    assert qa.identity() == moved.identity() != Ruler().identity()
    assert qa.identity() != Ruler(squad=squad(tmp_path / "f", "AB")).identity()
    assert Ruler(seed=1).identity() != Ruler().identity()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"datasets": ["niah_multikey3"]}, "task.datasets=niah_multikey3: must be one of cwe, fwe, niah_multikey_1"),
        ({"datasets": ["niah_multikey3"]}, "did you mean niah_multikey_3 or"),
        ({"datasets": []}, "task.datasets=[]: must be a list, each one of cwe"),
        ({"datasets": ["vt", "vt"]}, "task.datasets=[vt,vt]: must be a list, each one of cwe"),
        ({"datasets": 5}, "task.datasets=5: must be a list, each one of cwe"),
        ({"datasets": ["qa_1"]}, "task.squad=None: must be the JSON file of its questions for task.datasets=qa_1"),
        ({"datasets": ["qa_2"], "squad": "x"}, "task.hotpot=None: must be the JSON file"),
        ({"lengths": []}, "task.lengths=[]: must be a list of different whole numbers"),
        ({"lengths": [4096, 4096]}, "task.lengths=[4096,4096]: must be a list"),
        ({"lengths": 4096}, "task.lengths=4096: must be a list"),
        ({"lengths": [0]}, "task.lengths=[0]: must be a list"),
        ({"limit": 0}, "task.limit=0: must be a whole number >= 1, or null"),
        ({"limit": 2.5}, "task.limit=2.5"),
        ({"seed": "a"}, "task.seed=a: must be a whole number"),
        ({"chat": 1}, "task.chat=1: must be true or false"),
        ({"max_length": 0}, "task.max_length=0: must be a whole number >= 1, or null"),
        ({"squad": "/nowhere.json"}, "task.squad=/nowhere.json: must be a file: dev-v2.0.json of SQuAD; there is none"),
        ({"hotpot": "/nowhere.json"}, "task.hotpot=/nowhere.json: must be a file: hotpot_dev_distractor_v1.json"),
        ({"haystack": "/nowhere.txt"}, "task.haystack=/nowhere.txt: must be a text file, or a folder"),
    ],
)
def test_settings_that_cannot_be_used(keys: dict[str, Any], message: str) -> None:
    assert message in refused(**keys)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    assert "must hold text; it is empty" in refused(haystack=written(tmp_path, "empty.txt", " \n"))
    assert "must have sentence ends" in refused(haystack=written(tmp_path, "endless.txt", "words without an end"))
    torn = written(tmp_path, "torn.json", '{"data": [')
    assert f"task.squad={torn}: must be dev-v2.0.json of SQuAD, as published: JSONDecodeError" in refused(squad=torn)
    for nested in ("[" * 100_000, '{"data": ' + "7" * 5000 + "}"):
        assert "must be dev-v2.0.json of SQuAD, as published" in refused(squad=written(tmp_path, "n.json", nested))
    assert "as published: KeyError 'data'" in refused(squad=written(tmp_path, "v.json", {"version": 2}))
    assert "as published: TypeError" in refused(squad=hotpot(tmp_path))
    assert "must be hotpot_dev_distractor_v1.json" in refused(hotpot=squad(tmp_path))
    assert "as published: KeyError 'answer'" in refused(
        hotpot=written(tmp_path, "test.json", [{"question": "?", "context": []}])
    )
    assert "it has no question with an answer" in refused(squad=written(tmp_path, "none.json", {"data": []}))
    assert "it has no question with an answer" in refused(hotpot=written(tmp_path, "none2.json", []))
    assert "BadGzipFile" in refused(squad=written(tmp_path, "not.json.gz", {"data": []}))
    assert "UnicodeDecodeError" in refused(squad=written(tmp_path, "latin.json", b'{"data": "\xf8"}'))
    # no essay is asked for
    Ruler(datasets=["vt"], limit=1, haystack=str(tmp_path / "endless.txt")).examples()


@pytest.mark.parametrize("name", [*GENERATED, "qa_1", "qa_2"])
def test_a_length_that_holds_too_little_is_named_with_the_least(name: str, tmp_path: Path) -> None:
    """And the least holds it."""
    keys = {"datasets": [name], "limit": 1, "squad": squad(tmp_path), "hotpot": hotpot(tmp_path)}
    message = not_encoded(lengths=[100], **keys)
    least = int(re.findall(rf"^task\.lengths=100: must be at least (\d+) for {name}-100/000: \d+ tokens", message)[0])
    assert re.search(
        r"of a prompt with \d+ (words?|lines?|different words|coded words|documents?), and \d+ to ", message
    )
    # what is drawn depends on the length, and so, by a few tokens, does the least
    task = Ruler(lengths=[least + 40], **keys)  # type: ignore[arg-type]
    assert len(task.encode(task.examples()[0], Words(), None)) > least - 128 - 40


def test_a_length_above_the_limit_is_named_with_it() -> None:
    """Prompt tokens count: a length less the tokens to generate."""
    keys: dict[str, Any] = {"datasets": ["niah_single_1"], "lengths": [1128], "limit": 1}
    message = not_encoded(most=999, **keys)
    assert "task.lengths=1128: leaves 1000 prompt tokens to niah_single_1-1128, and the limit is 999" in message
    assert "the limit is 900" in not_encoded(most=999, **keys, max_length=900)
    task = Ruler(**keys)
    assert len(task.encode(task.examples()[0], Words(), 1000)) <= 1000


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_a_run_from_the_command_line(tmp_path: Path) -> None:
    model = save_local_model(tmp_path / "model")
    command = (
        "model=local",
        f"model.path={model}",
        "model.max_prompt_tokens=1000",
        f"results_dir={tmp_path / 'results'}",
        "method=snapkv",
        "method.budget=40",
        "task=ruler",
        "task.datasets=[niah_single_1]",
        "task.limit=2",
    )
    done = kvbench("run", *command, "task.lengths=[1000]")
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "results").glob("ruler/*/snapkv/*/record.json")
    found = json.loads(record.read_text(encoding="utf-8"))
    assert found["data"]["name"] == "ruler"
    rows = [json.loads(line) for line in (record.parent / "samples.jsonl").read_text().splitlines()]
    assert [(row["dataset"], row["id"], row["length"]) for row in rows] == [
        ("niah_single_1-1000", "000", 1000),
        ("niah_single_1-1000", "001", 1000),
    ]
    refused = kvbench("run", *command, "task.lengths=[2000]")
    assert refused.returncode == 2
    assert "task.lengths=2000: leaves 1872 prompt tokens" in refused.stderr.splitlines()[-1]
