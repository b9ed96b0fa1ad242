"""Prompts of benchmarks: every layout read, every count and digest held to, seeds and ids that stay, chosen evenly."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest

from srpo_cli.config.benchmark import Benchmark, load_benchmark
from srpo_cli.errors import MissingError, SrpoError, UsageError
from srpo_cli.miniature.world import draw_prompts, parse
from srpo_cli.registry import HubFiles
from srpo_cli.runtime.benchmarks import Item, load_items, picture_path, select
from srpo_cli.runtime.fetch import fetch

OLD, NEW, ELLA = "1" * 40, "2" * 40, load_benchmark("dpg").prompts.revision
"""Commits of a repository, and the one of dpg's."""

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a cat left of a dog",
    },
]


@pytest.fixture
def benchmark(tmp_path: Path) -> Callable[..., Benchmark]:
    """Write a benchmark of local files, by name and content, and load it; ``keys`` are more lines of its prompts."""

    def make(files: dict[str, str | bytes], layout: str, *keys: str) -> Benchmark:
        for name, content in files.items():
            place = tmp_path / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content if isinstance(content, bytes) else content.encode())
        listed = list(files) if layout != "folder" else ["texts"]
        lines = ["name: mine", "description: mine", "metrics: [statistics]", "prompts:", f"  layout: {layout}"]
        lines += [f"  files: {json.dumps(listed)}", *(f"  {key}" for key in keys)]
        (tmp_path / "mine.yaml").write_text("\n".join(lines) + "\n")
        return load_benchmark(str(tmp_path / "mine.yaml"))

    return make


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def hub_cache(tmp_path: Path, commit: str, files: dict[str, str], repo: str = "zhwang/HPDv2") -> Path:
    """Put files where the Hub client keeps a commit of a data set, the newest one so far."""
    place = tmp_path / "hub" / f"datasets--{repo.replace('/', '--')}"
    for name, content in files.items():
        file = place / "snapshots" / commit / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(commit)
    return place / "snapshots" / commit


def hpdv2_files(count: int = 800) -> dict[str, str]:
    """HPDv2's files in their form, with words of no meaning."""
    styles = load_benchmark("hpdv2").prompts.groups
    return {f"benchmark/{style}.json": json.dumps([f"{style} {i}" for i in range(count)]) for style in styles}


def refused(kind: type[SrpoError], *arguments, **options) -> str:
    with pytest.raises(kind) as caught:
        load_items(*arguments, **options)
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    return str(caught.value)


def shown(items: tuple[Item, ...]) -> list[tuple[str, str]]:
    return [(item.id, item.prompt) for item in items]


# Layouts


def test_lists_have_a_group_for_each_file(benchmark):
    lists = {"b/photo.json": '["a cat", " a dog\\n"]', "b/anime.json": '["a fox"]'}
    items = load_items(benchmark(lists, "lists")).items
    assert shown(items) == [("photo/00000", "a cat"), ("photo/00001", "a dog"), ("anime/00000", "a fox")]
    assert [item.index for item in items] == [0, 1, 2]


def test_lines_are_taken_once_each_in_their_order(benchmark):
    text = "a dog\na cat\na dog\n\na cat\na \u2028 fox\n" * 5
    items = load_items(benchmark({"test.txt": text}, "lines")).items
    assert shown(items) == [("00000", "a dog"), ("00001", "a cat"), ("00002", "a \u2028 fox")]


def test_a_tsv_has_categories_and_quotes_that_mean_themselves(benchmark):
    text = (
        "\ufeffPrompt\tCategory\tChallenge\tNote\r\n"
        'a sign that says "hi"\tArts\tBasic\t\r\n'
        '"hi" is what it says\tFood & Beverage\tBasic\tfrom a "book"\r\n'
        "42\tArts\tBasic\t\r\n"
    )
    items = load_items(benchmark({"p.tsv": text}, "tsv")).items
    assert shown(items) == [
        ("Arts/00000", 'a sign that says "hi"'),
        ("Food & Beverage/00000", '"hi" is what it says'),
        ("Arts/00001", "42"),
    ]
    assert items[1].extra == {"challenge": "Basic", "note": 'from a "book"'}


def test_geneval_items_carry_what_the_picture_should_show(benchmark):
    text = "".join(json.dumps(row) + "\n" for row in GENEVAL)
    items = load_items(benchmark({"evaluation_metadata.jsonl": text}, "geneval")).items
    assert [item.id for item in items] == ["single_object/00000", "counting/00000", "position/00000"]
    for item, row in zip(items, GENEVAL, strict=True):
        assert item.prompt == row["prompt"]
        assert item.extra == {"tag": row["tag"], "include": row["include"], "exclude": row.get("exclude", [])}


def test_a_folder_has_a_prompt_in_each_text_in_the_order_of_names(benchmark):
    texts = {"texts/10.txt": "ten\n", "texts/9.txt": "nine", "texts/b.txt": "\ufeffb", "texts/readme.md": "no"}
    items = load_items(benchmark(texts, "folder")).items
    assert [(item.prompt, item.extra["name"]) for item in items] == [("ten", "10"), ("nine", "9"), ("b", "b")]


def test_a_table_is_what_sample_reads(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a cat"}\n')
    items = load_items(load_benchmark(str(tmp_path / "mine.jsonl"))).items
    assert shown(items) == [("00000", "a cat"), ("00001", "a cat")]


@pytest.mark.parametrize("column", ["group", "style", "category"])
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_table_may_have_a_column_of_groups(ending, column, tmp_path):
    rows = [("a cat", "photo", 1), ("", "none", 2), ("a fox,\nred", "anime", 3), ("a dog ", "photo", 4)]
    table = pd.DataFrame(rows, columns=["prompt", column, "number"])
    file = tmp_path / f"mine.{ending}"
    if ending == "csv":
        file.write_text("\ufeff" + table.to_csv(index=False), encoding="utf-8")
    elif ending == "jsonl":
        table.to_json(file, orient="records", lines=True)
    else:
        table.to_parquet(file)
    expected = [("photo/00000", "a cat"), ("anime/00000", "a fox,\nred"), ("photo/00001", "a dog")]
    assert shown(load_items(load_benchmark(str(file))).items) == expected


def test_a_prompt_without_a_group_among_grouped_ones_is_named(tmp_path):
    (tmp_path / "mine.csv").write_text("prompt,style\na cat,photo\na dog,\n")
    assert "'a dog' has no style: give every prompt one" in refused(
        UsageError, load_benchmark(str(tmp_path / "mine.csv"))
    )


def test_the_world_gives_the_miniatures_evaluation_captions():
    prompts = load_items(load_benchmark("miniature"))
    assert [item.prompt for item in prompts.items] == draw_prompts(256, 0, "evaluation")
    assert all(parse(item.prompt) for item in prompts.items) and prompts.files == {}


@pytest.mark.parametrize(
    ("layout", "name", "content", "message"),
    [
        ("lists", "a.json", "[", "a.json is not JSON"),
        ("lists", "a.json", '{"prompts": ["x"]}', "should be a JSON list of prompts"),
        ("lists", "a.json", '["x", 3]', "should be a JSON list of prompts"),
        ("lists", "a.json", '["x", " "]', "prompt 2 of"),
        ("lists", "a.json", "[]", "holds no prompt"),
        ("lists", "a.json", b"\xff\xfe", "not UTF-8 text"),
        ("lists", ".git.json", '["x"]', "cannot be the name of a folder"),
        ("lines", "a.txt", "\n", "holds no prompt"),
        ("tsv", "a.tsv", "prompt\tcategory\nx\ty\n", "its columns are prompt, category"),
        ("tsv", "a.tsv", "", "its columns are none"),
        ("tsv", "a.tsv", "Prompt\tCategory\nx\ta/../../b\n", "group 'a/../../b'"),
        ("tsv", "a.tsv", "Prompt\tCategory\nx\t..\n", "group '..'"),
        ("geneval", "a.jsonl", json.dumps(GENEVAL[0]) + "\n{}\n", "line 2: not an object with tag"),
        ("geneval", "a.jsonl", json.dumps({**GENEVAL[0], "include": [{"class": "x"}]}), "line 1: not an object"),
        ("geneval", "a.jsonl", json.dumps({**GENEVAL[0], "exclude": None}), "line 1: not an object"),
        ("geneval", "a.jsonl", "not json", "line 1: not an object"),
        ("folder", "texts/a.txt", b"\xff\xfe", "the prompt a.txt of"),
        ("folder", "texts/a.md", "x", "holds no prompt"),
        ("table", "a.csv", "text\nx\n", "no column 'prompt'"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(benchmark, layout, name, content, message):
    assert message in refused(UsageError, benchmark({name: content}, layout))


# What is there and what should be


def test_a_digest_that_does_not_match_names_file_expected_and_seen(benchmark, tmp_path):
    text = '["a cat"]'
    right, wrong = hashlib.sha256(text.encode()).hexdigest(), "0" * 64
    good = load_items(benchmark({"a.json": text}, "lists", f"sha256: {{a.json: '{right}'}}"))
    assert (good.files, good.unverified) == ({"a.json": right}, ())
    message = refused(UsageError, benchmark({"a.json": text}, "lists", f"sha256: {{a.json: '{wrong}'}}"))
    assert "change prompts.sha256 in mine's .yaml" in message
    assert str(tmp_path / "a.json") in message and right in message and wrong in message


def test_a_repositorys_files_without_a_stated_digest_are_not_verified(tmp_path):
    for name, text in hpdv2_files().items():
        (tmp_path / Path(name).name).write_text(text)
    hpdv2 = load_benchmark("hpdv2")
    assert load_items(hpdv2, tmp_path).unverified == hpdv2.prompts.files
    first, *others = hpdv2.prompts.files
    digest = hashlib.sha256((tmp_path / Path(first).name).read_bytes()).hexdigest()
    prompts = hpdv2.prompts.model_copy(update={"sha256": {first: digest}})
    assert load_items(hpdv2.model_copy(update={"prompts": prompts}), tmp_path).unverified == tuple(others)


def test_ones_own_prompts_and_those_of_the_miniature_need_nobody_to_vouch_for_them(benchmark):
    assert load_items(benchmark({"a.json": '["a cat"]'}, "lists")).unverified == ()
    assert load_items(load_benchmark("miniature")).unverified == ()


def test_the_digest_of_a_folder_is_what_sha256sum_makes_of_it(benchmark):
    texts = {"texts/a.txt": "one", "texts/b.txt": "two"}
    # LC_ALL=C sha256sum *.txt | sha256sum, with coreutils
    digest = "408e5b7a92221a051491158c0d15a8d6594bb09115cf53e0a1359e7a05321f40"
    assert load_items(benchmark(texts, "folder")).files == {"texts": digest}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("groups: {anime: 2, photo: 2}", "1 prompts of photo, expected are 2"),
        ("groups: {anime: 2, photo: 1, paintings: 1}", "0 prompts of paintings, expected are 1"),
        ("groups: {anime: 2}", "a group 'photo', expected are anime"),
        ("groups: {photo: 1, anime: 2}", "groups in the order anime, photo, expected is photo, anime"),
        ("count: 4", "3 prompts, expected are 4"),
    ],
)
def test_counts_that_do_not_match_are_refused(benchmark, keys, message):
    lists = {"anime.json": '["a", "b"]', "photo.json": '["c"]'}
    told = refused(UsageError, benchmark(lists, "lists", keys))
    assert message in told and f": change prompts.{keys.partition(':')[0]} in mine's .yaml, or take it out" in told


@pytest.mark.parametrize("keys", ["groups: {anime: 2, photo: 1}", "count: 3"])
def test_counts_that_match_are_not(benchmark, keys):
    lists = {"anime.json": '["a", "b"]', "photo.json": '["c"]'}
    assert len(load_items(benchmark(lists, "lists", keys)).items) == 3


def test_given_files_of_another_number_lead_to_a_benchmark_of_ones_own(tmp_path):
    for name, text in hpdv2_files(3).items():
        (tmp_path / Path(name).name).write_text(text)
    message = refused(SrpoError, load_benchmark("hpdv2"), tmp_path)
    assert "holds 3 prompts of anime, expected are 800" in message and "`extends: hpdv2`" in message
    groups = "{anime: 3, concept-art: 3, paintings: 3, photo: 3}"
    (tmp_path / "small.yaml").write_text(f"extends: hpdv2\nprompts: {{groups: {groups}}}\n")
    items = load_items(load_benchmark(str(tmp_path / "small.yaml")), tmp_path).items
    assert [item.prompt for item in items][:4] == ["anime 0", "anime 1", "anime 2", "concept-art 0"]


def test_the_set_of_prompts_has_a_digest_that_only_its_prompts_and_groups_decide(benchmark, tmp_path):
    first = load_items(benchmark({"a.json": '["x", "y"]'}, "lists"))
    spaced = load_items(benchmark({"a.json": '[ "x",\n"y "]'}, "lists"))
    moved = load_items(benchmark({"b.json": '["x", "y"]'}, "lists"))
    fewer = load_items(benchmark({"a.json": '["x", "y"]'}, "lists", "first_of_group: 1"))
    assert first.sha256 == spaced.sha256 and first.files != spaced.files
    assert len({first.sha256, moved.sha256, fewer.sha256}) == 3
    assert first.sha256 == hashlib.sha256(b'[["a", "x"], ["a", "y"]]').hexdigest()


# Choosing


@pytest.fixture
def hpdv2(tmp_path) -> tuple[Item, ...]:
    hub_cache(tmp_path, NEW, hpdv2_files())
    return load_items(load_benchmark("hpdv2")).items


def test_a_limit_takes_the_first_ones_of_every_style_alike(hpdv2):
    chosen = select(hpdv2, limit=100)
    assert Counter(item.group for item in chosen) == dict.fromkeys(load_benchmark("hpdv2").prompts.groups, 25)
    assert {item.number for item in chosen} == set(range(25))
    assert [item.index for item in chosen] == sorted(item.index for item in chosen)


def test_a_limit_by_hand():
    groups = ["a", "a", "a", "b", "c", "c"]
    numbers = [0, 1, 2, 0, 0, 1]
    items = [Item(i, group, number, "x") for i, (group, number) in enumerate(zip(groups, numbers, strict=True))]
    taken = {limit: [item.index for item in select(items, limit)] for limit in (1, 2, 4, 5, 6, 9)}
    assert taken == {
        1: [0],
        2: [0, 3],
        4: [0, 1, 3, 4],
        5: [0, 1, 3, 4, 5],
        6: [0, 1, 2, 3, 4, 5],
        9: [0, 1, 2, 3, 4, 5],
    }
    assert [item.index for item in select(items, 2, "c")] == [4, 5]


def test_choosing_changes_neither_ids_nor_seeds(hpdv2):
    benchmark, by_id = load_benchmark("hpdv2"), {item.id: item for item in hpdv2}
    assert len(by_id) == 3200
    for chosen in (select(hpdv2, 10), select(hpdv2, None, "photo"), select(hpdv2, 3, "paintings")):
        assert chosen and all(by_id[item.id] == item for item in chosen)
    assert benchmark.first_seed(select(hpdv2, 1, "concept-art")[0].index) == 42 + 1000 * 800


def test_the_study_prompts_are_hpdv2s_own_with_its_seeds(hpdv2):
    study = load_items(load_benchmark("hpdv2-500")).items
    assert len(study) == 500
    assert list(study) == [item for item in hpdv2 if item.number < 125]


def test_an_unknown_group_is_refused_with_the_nearest(hpdv2):
    with pytest.raises(UsageError, match=r"Unknown group 'fotos'. Did you mean 'photo'\? Available: anime"):
        select(hpdv2, group="fotos")
    with pytest.raises(UsageError, match="no group 'photo': this benchmark has no groups"):
        select([Item(0, "", 0, "x")], group="photo")


def test_pictures_made_elsewhere_are_where_their_makers_put_them():
    item = Item(803, "concept-art", 3, "x")
    hpdv2 = load_benchmark("hpdv2")
    assert picture_path(hpdv2, item) == "concept-art/00003"
    assert picture_path(hpdv2.model_copy(update={"images_per_prompt": 2}), item, 1) == "concept-art/00003-1"
    assert picture_path(load_benchmark("geneval"), Item(80, "two_object", 0, "x"), 3) == "00080/samples/00003"
    assert picture_path(load_benchmark("dpg"), Item(7, "", 7, "x", {"name": "vrd12"}), 2) == "vrd12-2"
    assert picture_path(load_benchmark("drawbench"), Item(7, "", 7, "x")) == "00007"


# Finding


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hpdv2", ["`hf download zhwang/HPDv2 benchmark/anime.json", "--repo-type dataset`", "--prompts FOLDER"]),
        ("drawbench", ["curl -L", "https://raw.githubusercontent.com/NVlabs/DiffusionNFT/HEAD/", "--prompts FILE"]),
        ("parti", ["parti/2c99f6652cbc7f0d0441aa91f4c7e7055bcb0071/PartiPrompts.tsv`"]),
        ("geneval", ["geneval/HEAD/prompts/evaluation_metadata.jsonl`"]),
        ("dpg", [f"https://github.com/TencentQQGYLab/ELLA/archive/{ELLA}.zip`", "--prompts FOLDER"]),
    ],
)
def test_prompts_that_are_not_here_come_with_the_command_that_fetches_them(name, parts):
    message = refused(MissingError, load_benchmark(name))
    for part in [f"the prompts of {name} are not here", "add --download", *parts]:
        assert part in message


def test_the_command_puts_a_file_where_it_is_looked_for(tmp_path):
    message = refused(MissingError, load_benchmark("parti"))
    place = Path(message.partition(" -o ")[2].partition(" ")[0])
    place.parent.mkdir(parents=True)
    rows = "".join(f"prompt {i}\tArts\n" for i in range(1632))
    place.write_text("Prompt\tCategory\n" + rows)
    prompts = load_items(load_benchmark("parti"))
    assert len(prompts.items) == 1632 and prompts.origin.startswith("google-research/parti@2c99f66")


def test_a_stated_commit_is_taken_from_the_cache_and_not_the_newest(tmp_path):
    for commit, word in ((OLD, "old"), (NEW, "new")):
        hub_cache(tmp_path, commit, {"a.json": f'["{word}"]'}, "us/ours")
    text = "name: m\ndescription: m\nmetrics: [statistics]\n"
    text += "prompts: {layout: lists, repo: us/ours, hub: dataset, files: [a.json]"
    (tmp_path / "newest.yaml").write_text(text + "}\n")
    (tmp_path / "pinned.yaml").write_text(text + f", revision: '{OLD}'}}\n")
    found = [load_items(load_benchmark(str(tmp_path / f"{name}.yaml"))).items[0] for name in ("newest", "pinned")]
    assert [item.prompt for item in found] == ["new", "old"]
    (tmp_path / "lost.yaml").write_text(text + f", revision: '{'3' * 40}'}}\n")
    assert f"--revision {'3' * 40}`" in refused(MissingError, load_benchmark(str(tmp_path / "lost.yaml")))


def test_a_stated_commit_is_what_is_downloaded(tmp_path):
    files = HubFiles("us/ours", ("a.json",), repo_type="dataset", size="1 kB")
    old = hub_cache(tmp_path, OLD, {"a.json": "[]"}, "us/ours")
    hub_cache(tmp_path, NEW, {"a.json": "[]"}, "us/ours")
    assert fetch(files, lambda _: None, OLD) == old
    with pytest.raises(MissingError, match=f"us/ours a.json --repo-type dataset --revision {'3' * 40}"):
        fetch(files, lambda _: None, "3" * 40)


def test_one_file_of_four_is_not_enough(tmp_path):
    files = hpdv2_files()
    hub_cache(tmp_path, NEW, {name: files[name] for name in list(files)[:3]})
    refused(MissingError, load_benchmark("hpdv2"))
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "anime.json").write_text(files["benchmark/anime.json"])
    assert "holds no concept-art.json" in refused(MissingError, load_benchmark("hpdv2"), folder)
    message = refused(UsageError, load_benchmark("hpdv2"), folder / "anime.json")
    assert "has 4 files" in message and "photo.json" in message


def test_given_files_may_lie_as_published_or_side_by_side(tmp_path):
    for name, text in hpdv2_files().items():
        for place in (tmp_path / "published" / name, tmp_path / "flat" / Path(name).name):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
    published, flat = (load_items(load_benchmark("hpdv2"), tmp_path / place) for place in ("published", "flat"))
    assert published.sha256 == flat.sha256 and published.files == flat.files
    assert flat.origin == str(tmp_path / "flat")


def test_one_given_file_may_have_any_name_and_keeps_its_group(benchmark, tmp_path):
    lists = benchmark({"photo.json": '["x"]'}, "lists")
    (tmp_path / "renamed").write_text('["y"]')
    assert shown(load_items(lists, tmp_path / "renamed").items) == [("photo/00000", "y")]


def test_what_was_given_and_is_not_there_is_one_line(tmp_path):
    message = refused(MissingError, load_benchmark("parti"), tmp_path / "nope.tsv")
    assert f"no prompts at {tmp_path / 'nope.tsv'}" in message


def test_the_miniature_takes_no_prompts_of_others(tmp_path):
    assert "use --benchmark mine.txt" in refused(UsageError, load_benchmark("miniature"), Path("mine.txt"))


@pytest.fixture
def github(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is served in place of GitHub."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    folder = tmp_path / "github"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("_FILES", "_ARCHIVES"):
        monkeypatch.setattr(f"srpo_cli.runtime.benchmarks.{name}", f"http://127.0.0.1:{server.server_port}")
    yield folder
    server.shutdown()


def serve(place: Path, content: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(content)


def test_a_file_of_github_is_announced_fetched_once_and_kept(github):
    place = github / "NVlabs/DiffusionNFT/HEAD/dataset/drawbench/test.txt"
    serve(place, "".join(f"prompt {i % 200}\n" for i in range(1000)))
    said: list[str] = []
    prompts = load_items(load_benchmark("drawbench"), announce=said.append)
    assert len(prompts.items) == 200 and len(said) == 1 and "test.txt" in said[0]
    place.unlink()
    assert load_items(load_benchmark("drawbench")) == prompts


def test_files_of_one_name_in_two_repositories_do_not_meet(github, tmp_path):
    for owner in ("us", "them"):
        serve(github / owner / "ours/HEAD/test.txt", f"a prompt of {owner}\n")
        text = "name: m\ndescription: m\nmetrics: [statistics]\n"
        text += f"prompts: {{layout: lines, repo: {owner}/ours, hub: github, files: [test.txt]}}\n"
        (tmp_path / f"{owner}.yaml").write_text(text)
    found = [load_items(load_benchmark(str(tmp_path / f"{o}.yaml")), announce=print) for o in ("us", "them")]
    assert [prompts.items[0].prompt for prompts in found] == ["a prompt of us", "a prompt of them"]


def test_a_changed_file_of_github_says_how_to_fetch_it_anew(github):
    serve(github / "NVlabs/DiffusionNFT/HEAD/dataset/drawbench/test.txt", "one prompt\n")
    message = refused(SrpoError, load_benchmark("drawbench"), announce=print)
    assert "holds 1 prompts, expected are 200" in message and "fetch it anew with `curl -L" in message


def test_a_file_that_github_does_not_have_is_one_line(github):
    message = refused(MissingError, load_benchmark("geneval"), announce=lambda _: None)
    assert "could not be downloaded" in message and "by hand: curl -L" in message


def test_a_folder_of_github_comes_out_of_its_archive_and_is_the_folder(github, tmp_path):
    archive = github / f"TencentQQGYLab/ELLA/archive/{ELLA}.zip"
    archive.parent.mkdir(parents=True)
    folder = tmp_path / "ELLA/dpg_bench/prompts"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("ELLA-main/requirements.txt", "torch")
        file.writestr("ELLA-main/other/prompts/0.txt", "not one of them")
        for number in range(1065):
            file.writestr(f"ELLA-main/dpg_bench/prompts/{number}.txt", f"prompt {number}\n")
            (folder / f"{number}.txt").write_text(f"prompt {number}\n")
    fetched = load_items(load_benchmark("dpg"), announce=lambda _: None)
    assert [item.extra["name"] for item in fetched.items][:3] == ["0", "1", "10"]
    for given in (folder, tmp_path / "ELLA", archive):
        prompts = load_items(load_benchmark("dpg"), given)
        assert (prompts.items, prompts.files) == (fetched.items, fetched.files)


def test_an_archive_that_is_none_is_one_line(tmp_path):
    (tmp_path / "ELLA.zip").write_text("<html>not found</html>")
    assert "neither a folder of .txt nor an archive" in refused(
        UsageError, load_benchmark("dpg"), tmp_path / "ELLA.zip"
    )
