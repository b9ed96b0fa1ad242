"""Other people's rewards: found, asked about, run as they were read, and not believed blindly."""

import base64
import io
import json
import py_compile
import re
import socket
import subprocess
import sys
import threading
import time
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import cache_from_source
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from PIL import Image, ImageStat

from srpo_cli.algorithms.base import ControlWords
from srpo_cli.config.schema import RewardConfig
from srpo_cli.errors import MissingError, SrpoError, UsageError
from srpo_cli.recipes.parts import load_reward, load_training_reward
from srpo_cli.registry import REWARDS
from srpo_cli.rewards.base import Reward
from srpo_cli.rewards.miniature import load_miniature
from srpo_cli.rewards.mixed import MixedReward
from srpo_cli.trust import digest_of, trust

PLUGINS = Path(__file__).parent / "plugins"
DOCS = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
CPU = torch.device("cpu")
WORDS = ControlWords(["photo"], ["render"])


@pytest.fixture(autouse=True)
def a_user_of_its_own(monkeypatch, tmp_path):
    """Nobody has trusted anything, and nothing that a test trusts is remembered."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("srpo_cli.trust._this_process", set())


@pytest.fixture
def write(tmp_path):
    """Writes a plug-in and trusts it."""

    def to_file(source, name="judge.py"):
        path = tmp_path / name
        path.write_text(source)
        trust(path)
        return path

    return to_file


@pytest.fixture
def images():
    return torch.rand(3, 3, 8, 6, generator=torch.Generator().manual_seed(0))


def load(name, weights=None):
    return load_reward(str(name), weights, CPU)


def function(body, differentiable=False):
    """Source of a plug-in whose function has this body."""
    return (
        "import torch\nfrom srpo_cli.rewards.plugins import reward\n\n"
        f"@reward(unit='u', reads_text=True, differentiable={differentiable})\n"
        f"def load(images, prompts):\n    {body}\n"
    )


# What a plug-in may be


def test_a_function_in_a_file_is_a_reward(images):
    path = PLUGINS / "brightness.py"
    trust(path)
    reward = load(path)
    assert (reward.name, reward.unit) == (str(path), "mean of the pixels, 0 to 1")
    assert (reward.reads_text, reward.differentiable) == (False, True)
    assert reward.weights == f"brightness.py sha256:{digest_of(path)}"
    torch.testing.assert_close(reward(images, ["", "", ""]), images.mean((1, 2, 3)))
    torch.testing.assert_close(reward(list(images), ["", "", ""]), images.mean((1, 2, 3)))
    assert [scores.shape for scores in reward.scores(images, ["a"] * 3, ["b"] * 3)] == [(3,), (3,)]


def test_a_loader_gets_what_a_built_in_one_gets(write, tmp_path):
    path = write(
        "import torch\nfrom srpo_cli.rewards.base import Reward\n\n"
        "class Judge(Reward):\n"
        "    def __init__(self, name, weights, device, dtype, announce=None):\n"
        "        self.given = (name, weights, device, dtype, announce)\n"
        "        self.weights, self.layer = 'judge 7', torch.nn.Linear(1, 1)\n"
        "    def __call__(self, images, prompts):\n"
        "        return torch.tensor([float(len(p)) for p in prompts], dtype=torch.float16)\n"
    )
    reward = load(f"{path}:Judge", tmp_path / "w")
    assert reward.inner.given == (f"{path}:Judge", tmp_path / "w", CPU, torch.float32, None)
    assert reward.weights == f"judge.py sha256:{digest_of(path)}; judge 7"
    torch.testing.assert_close(reward(torch.zeros(2, 3, 4, 4), ["abc", ""]), torch.tensor([3.0, 0.0]))
    assert [parameter.requires_grad for parameter in reward.parameters()] == [False, False]


def test_a_built_in_reward_behind_a_plugin_scores_and_trains_as_it_is(write, images):
    path = write("from srpo_cli.rewards.miniature import load_miniature as load\n")
    mine, built_in = load(path), load_miniature()
    texts = ["a red cube", "a blue cone", ""]
    for mode in (None, "training", "reference", built_in.modes[0]):
        assert torch.equal(mine.via(mode)(images, texts), built_in.via(mode)(images, texts))
    assert mine.via("training").preprocess == built_in.via("training").preprocess
    gradients = []
    for reward in (load_training_reward(RewardConfig(name=str(path)), WORDS, CPU), built_in.via("training")):
        leaf = images.clone().requires_grad_()
        sum(reward.scores(leaf, texts, texts[::-1])).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert sum(1 for _ in mine.parameters()) == sum(1 for _ in built_in.parameters()) > 0


def test_a_plugin_is_told_ahead_which_texts_it_will_be_asked_for(write):
    source = (
        "from srpo_cli.rewards.miniature import load_miniature\n\n"
        "def load(name, weights, device, dtype, announce):\n"
        "    inner = load_miniature()\n    inner.told = []\n    inner.prepare = inner.told.extend\n    return inner\n"
    )
    reward = load(write(source))
    MixedReward([(1.0, reward)]).prepare(["a red cube", "a cone"])
    assert reward.inner.told == ["a red cube", "a cone"]


def test_annotations_that_are_text_work_in_a_plugins_dataclass(write, images):
    """They are looked up in the module by its name; and ours, which are text, must not become the plug-in's."""
    pair = "from dataclasses import dataclass\n\n@dataclass\nclass Pair:\n    a: int\n    b: 'int'\n\n"
    ones = "return torch.ones(3) * (Pair.__annotations__ == {'a': int, 'b': 'int'})"
    assert load(write(pair + function(ones)))(images, [""] * 3).tolist() == [1, 1, 1]


# What is refused, each in one line


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("x = (\n", SrpoError, r"failed at \S+judge.py:1: SyntaxError: '\(' was never closed"),
        ("\n\n1 / 0\n", SrpoError, r"failed at \S+judge.py:3: ZeroDivisionError: division by zero$"),
        ("import sys\nsys.exit()\n", SrpoError, r"failed at \S+judge.py:2: SystemExit: $"),
        (
            "import no_such_package\n",
            MissingError,
            r"package that is not here at \S+judge.py:1: No module named 'no_such",
        ),
        ("x = 1\n", UsageError, r"defines no 'load': see docs/plugins.md$"),
        (function("").replace("load", "other").replace("    \n", "    ...\n"), UsageError, r"as in \S+judge.py:other$"),
        ("load = 1\n", UsageError, "is neither a Reward nor a loader"),
        ("def load(images, prompts): ...\n", UsageError, "becomes a Reward by @srpo_cli.rewards.plugins.reward$"),
        ("def load(*_): return 1\n", UsageError, "is a loader that returned a int, not a Reward"),
        ("def load(*_):\n    return [][0]\n", SrpoError, r"failed at \S+judge.py:2: IndexError"),
        ("from srpo_cli.rewards.base import Reward\nload = Reward\n", UsageError, "neither a Reward nor a loader"),
    ],
)
def test_a_file_that_defines_no_reward(source, error, message, write):
    with pytest.raises(error, match=message) as caught:
        load(write(source))
    assert type(caught.value) is error and "\n" not in str(caught.value) and "judge.py" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return images.mean()", r"returned shape \(\) for 3 pictures"),
        ("return images.mean((2, 3))", r"returned shape \(3, 3\) for 3 pictures"),
        ("return [0.5] * 3", "returned a list: it must return a tensor"),
        ("return torch.arange(3)", "returned torch.int64: rewards are floating-point"),
        ("return torch.tensor([0, 1, float('nan')])", "returned nan for picture 2: rewards are finite"),
        ("return torch.tensor([0, float('-inf'), 1])", "returned -inf for picture 1"),
        ("raise KeyError('x')", r"failed at \S+judge.py:6: KeyError: 'x'$"),
    ],
)
def test_an_answer_that_is_no_reward(body, message, write, images):
    path = write(function(body))
    reward = load(path)
    for ask in (lambda: reward(images, [""] * 3), lambda: reward.scores(images, [""] * 3)):
        with pytest.raises(SrpoError, match=f"the plug-in {path} {message}"):
            ask()


def test_pictures_that_are_not_finite_are_not_blamed_on_the_plugin(write, images):
    images[1, 0, 0, 0] = torch.nan
    assert load(write(function("return images.mean((1, 2, 3))")))(images, [""] * 3).isnan().tolist() == [
        False,
        True,
        False,
    ]


def test_a_promised_gradient_is_missed_only_where_one_is_wanted(write, images):
    reward = load(write(function("return images.detach().mean((1, 2, 3))", differentiable=True)))
    assert reward(images, [""] * 3).shape == (3,)
    with torch.no_grad():
        reward(images.requires_grad_(), [""] * 3)
    with pytest.raises(SrpoError, match="rewards without gradient and says differentiable=True"):
        reward(images, [""] * 3)


def test_weights_for_a_reward_that_takes_none(write, tmp_path):
    with pytest.raises(UsageError, match="takes no weights, and is given"):
        load(write(function("return images.mean((1, 2, 3))")), tmp_path / "w")


def test_what_has_no_gradient_or_reads_no_text_does_not_train(write):
    trust(PLUGINS / "brightness.py")
    with pytest.raises(UsageError, match=r"brightness.py reads no text"):
        load_training_reward(RewardConfig(name=str(PLUGINS / "brightness.py")), WORDS, CPU)
    with pytest.raises(UsageError, match=r"judge.py has no gradient"):
        load_training_reward(RewardConfig(name=str(write(function("...")))), WORDS, CPU)


# A file's code runs only as it was read


def test_an_untrusted_file_does_not_run(tmp_path):
    path, canary = tmp_path / "judge.py", tmp_path / "canary"
    path.write_text(f"open({str(canary)!r}, 'w')\n")
    with pytest.raises(UsageError, match="is Python code that would run here"):
        load(path)
    assert not canary.exists()
    trust(path)
    with pytest.raises(UsageError, match="defines no 'load'"):
        load(path)
    assert canary.exists()


def test_a_compiled_copy_beside_a_trusted_file_does_not_run(write, tmp_path, images):
    """The import system would take this one without looking at the source, as ``import`` shows."""
    path, evil, canary = write(function("return torch.ones(3)")), tmp_path / "evil.py", tmp_path / "canary"
    evil.write_text(f"open({str(canary)!r}, 'w')\n")
    compiled = cache_from_source(str(path))
    py_compile.compile(str(evil), compiled, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    assert load(path)(images, [""] * 3).tolist() == [1, 1, 1]
    assert not canary.exists()
    subprocess.run([sys.executable, "-c", "import judge"], cwd=tmp_path, check=True)
    assert canary.exists()


def test_a_plugin_leaves_the_search_path_alone(write):
    before = list(sys.path)
    load(write(function("...")))
    assert sys.path == before


# Installed packages


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a package with entry points, as in pyproject.toml, where the interpreter finds packages."""

    def package(name, entries, **modules):
        folder = tmp_path / name
        info = folder / f"{name.replace('-', '_')}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = "".join(f"{key} = {value}\n" for key, value in entries.items())
        (info / "entry_points.txt").write_text(f"[srpo.rewards]\n{lines}")
        for module, source in modules.items():
            (folder / f"{module}.py").write_text(source)
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.syspath_prepend(folder)
        return folder

    return package


def test_an_entry_point_is_a_reward_without_being_asked_about(install, images):
    (group,) = tomllib.loads(re.search(r"```toml\n(.*?)```", DOCS, re.DOTALL)[1])["project"]["entry-points"].items()
    assert group == ("srpo.rewards", {"brightness": "my_judges.brightness:load"})
    folder = install("my-judges", {"brightness": "my_brightness:load"})
    (folder / "my_brightness.py").write_text((PLUGINS / "brightness.py").read_text())
    reward = load("brightness")
    torch.testing.assert_close(reward(images, [""] * 3), images.mean((1, 2, 3)))
    assert reward.name == "brightness"
    assert reward.weights == f"my-judges 1.2, my_brightness.py sha256:{digest_of(PLUGINS / 'brightness.py')}"


def test_it_is_found_without_being_imported_and_suggested(install):
    install("my-judges", {"sharpness": "not_there:load"})
    assert REWARDS.find("sharpness").startswith("srpo_cli.rewards.plugins:")
    with pytest.raises(UsageError, match=r"Did you mean 'sharpness'\? Available: .*, FILE.py, sharpness\.$"):
        REWARDS.find("sharpnes")
    with pytest.raises(MissingError, match=r"sharpness of my-judges 1.2 needs a package that is not here.*'not_there'"):
        load("sharpness")


def test_its_answers_are_checked_too(install, images):
    install("my-judges", {"bad": "bad_judge:load"}, bad_judge=function("return images.mean()"))
    with pytest.raises(SrpoError, match=r"the plug-in bad returned shape \(\)"):
        load("bad")(images, [""] * 3)


def test_what_is_built_in_wins(install):
    entries = {"miniature": "evil:load", "clip:ViT-B-32": "evil:load", "judge.py": "evil:load"}
    install("my-judges", entries, evil="raise RuntimeError\n")
    for name in ("miniature", "clip:ViT-B-32"):
        assert REWARDS.plugin(name) is None
        assert REWARDS.shadowed(name).package == "my-judges 1.2"
    assert load("miniature").weights.startswith("reward.safetensors")
    assert REWARDS.shadowed("hpsv2.1") is None
    with pytest.raises(UsageError, match=r"cannot read the plug-in judge.py"):  # a file, which is asked about
        load("judge.py")


def test_a_name_of_two_packages_is_nobodys(install):
    for package in ("judges-a", "judges-b"):
        install(package, {"mine": "mine:load"})
    with pytest.raises(UsageError, match=r"reward mine is offered by judges-[ab] 1.2 and judges-[ab] 1.2: uninstall"):
        REWARDS.find("mine")


@pytest.mark.parametrize("name", ["judge.py:", "judge.py:a.b", "judge.py:a b"])
def test_a_part_of_a_file_that_is_no_name(name):
    with pytest.raises(UsageError, match=r"write FILE.py, or FILE.py:NAME"):
        REWARDS.find(name)


# A judge that is served


class Server(ThreadingHTTPServer):
    """An OpenAI-style endpoint on this machine. ``answers``: what to send, by turns; None: a score by brightness."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests = [], []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        assert self.path == "/v1/models"
        self.send(200, json.dumps({"data": [{"id": "a-judge"}]}))

    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((dict(self.headers), request))
        answers = self.server.answers
        status, body = (answers.pop(0) if answers else None) or (200, completion(self.judge(request)))
        self.send(status, body)

    def judge(self, request):
        url = request["messages"][0]["content"][0]["image_url"]["url"]
        header, _, data = url.partition(",")
        assert header == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            return f"It is nice.\n**Final Score:** {1 + 4 * ImageStat.Stat(picture.convert('L')).mean[0] / 255}"

    def send(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


def completion(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("JUDGE_URL", server.url)
        yield server
        server.shutdown()


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that were slept, all at once."""
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    return slept


@pytest.fixture
def served():
    """Loads the plug-in."""

    def judge(path=PLUGINS / "served_judge.py"):
        trust(path)
        return load(path)

    return judge


def test_the_score_arrives_for_its_own_picture(server, served, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    reward = served()
    levels = torch.arange(10) / 9
    pictures = [level.expand(3, 4 + i, 10 - i) for i, level in enumerate(levels)]
    scores = reward(pictures, [f"prompt {i}" for i in range(10)])
    torch.testing.assert_close(scores, 1 + 4 * levels, atol=4 / 255, rtol=0)
    assert (reward.unit, reward.differentiable, reward.reads_text) == ("1 to 5", False, True)
    assert reward.weights.endswith(f"; a-judge at {server.url}")
    headers, request = server.requests[0]
    assert headers["Authorization"] == "Bearer secret"
    assert (request["model"], request["temperature"]) == ("a-judge", 0)
    texts = [request["messages"][0]["content"][1]["text"] for _, request in server.requests]
    assert sorted(re.search(r"prompt \d", text)[0] for text in texts) == [f"prompt {i}" for i in range(10)]


def test_a_busy_server_is_asked_again(server, served, pauses):
    server.answers = [(503, ""), (429, ""), None]
    assert served()(torch.ones(1, 3, 4, 4), ["a"]).tolist() == [5.0]
    assert (len(server.requests), pauses) == (3, [1.0, 2.0])


@pytest.mark.parametrize(
    ("answers", "attempts", "message"),
    [
        ([(500, "boom")] * 9, 3, r"/chat/completions: 500 Internal Server Error, after 3 attempt"),
        ([(400, "no such model")], 1, r"/chat/completions: 400 Bad Request, after 1 attempt"),
        ([(200, "<html>")], 1, r"/chat/completions: no JSON \("),
        ([(200, completion("I like it"))], 1, "answered without a score: .*I like it"),
        ([(200, completion(None))], 1, "answered without a score"),
        ([(200, "{}")], 1, r"answered without a score: \{\}$"),
        ([(200, "[]")], 1, r"answered without a score: \[\]$"),
        ([(200, completion("Final Score: 40"))], 1, "answered with the score 40: it is from 1 to 5"),
        ([(200, completion("Final Score: -1.5"))], 1, "answered with the score -1.5"),
        ([(200, completion("Final Score: nan"))], 1, "answered without a score"),
    ],
)
def test_an_answer_without_a_score_is_one_line_and_never_a_number(answers, attempts, message, server, served, pauses):
    server.answers = answers
    with pytest.raises(SrpoError, match=message) as caught:
        served()(torch.ones(1, 3, 4, 4), ["a"])
    assert "\n" not in str(caught.value) and server.url in str(caught.value)
    assert len(server.requests) == attempts


def test_a_server_that_is_not_there(served, pauses, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{free.getsockname()[1]}/v1")
        with pytest.raises(SrpoError, match=r"/v1/models: .*refused, after 3 attempt"):
            served()
    assert pauses == [1.0, 2.0]


@pytest.mark.parametrize("url", [None, "localhost:8000/v1"])
def test_nothing_is_asked_of_a_server_that_nobody_named(url, served, monkeypatch):
    monkeypatch.delenv("JUDGE_URL", raising=False)
    if url:
        monkeypatch.setenv("JUDGE_URL", url)
    with pytest.raises(MissingError, match=r"set it, as in http://localhost:8000/v1$"):
        served()


# The page


def block(start):
    """The code block of docs/plugins.md that begins so."""
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL) if code.startswith(start)]
    return found


@pytest.mark.parametrize("name", ["brightness.py", "served_judge.py"])
def test_the_page_shows_the_plugins_that_are_tested(name):
    source = (PLUGINS / name).read_text()
    assert block(source.splitlines()[0]) == source


def test_the_page_names_all_that_a_reward_has():
    own = [name for name in vars(Reward) if not name.startswith("_")]
    absent = {name for name in own if f"`{name}" not in DOCS}
    assert absent <= {"name", "parameters", "device", "via", "tells_prompts"}  # for srpo itself


def test_the_pages_server_for_hpsv3_can_be_asked(served, tmp_path, monkeypatch):
    """The model is a stand-in: minus the length of the prompt, plus the brightness of the picture."""
    (tmp_path / "serve_hpsv3.py").write_text(block('"""HPSv3 behind'))
    (tmp_path / "hpsv3.py").write_text(
        "from PIL import ImageStat\n"
        "class Number(float):\n    def item(self): return float(self)\n"
        "class HPSv3RewardInferencer:\n"
        "    def __init__(self, device): pass\n"
        "    def reward(self, prompts, image_paths):\n"
        "        light = ImageStat.Stat(image_paths[0].convert('L')).mean[0] / 255\n"
        "        return [[Number(light - len(prompts[0])), Number(0)]]\n"
    )
    source = (PLUGINS / "served_judge.py").read_text()
    for line in ('QUESTION = "{prompt}"', 'unit = "mu of HPSv3"', "LOWEST, HIGHEST = -100, 100"):
        assert f"`{line}`" in " ".join(DOCS.split())
    source = re.sub('QUESTION = """.*?"""', 'QUESTION = "{prompt}"', source, flags=re.DOTALL)
    (tmp_path / "judge.py").write_text(source.replace("LOWEST, HIGHEST = 1, 5", "LOWEST, HIGHEST = -100, 100"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("JUDGE_URL", f"http://localhost:{port}/v1")
    process = subprocess.Popen([sys.executable, "serve_hpsv3.py", str(port)], cwd=tmp_path, stderr=subprocess.PIPE)
    try:
        until_it_answers(f"http://localhost:{port}/v1/models", process)
        scores = served(tmp_path / "judge.py")(torch.ones(2, 3, 4, 4), ["abc", "a"])
    finally:
        process.kill()
        process.communicate()
    assert scores.tolist() == [-2.0, 0.0]


def until_it_answers(url, process):
    for _ in range(200):
        assert process.poll() is None, process.stderr.read()
        try:
            return urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"{url} does not answer")
