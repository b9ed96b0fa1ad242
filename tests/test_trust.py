"""Agreement to run a Python file: asked once, for its content, and remembered."""

import json
import stat

import pytest

from srpo_cli.errors import UsageError
from srpo_cli.trust import check_trusted, read_trusted, trust


@pytest.fixture
def another_process(monkeypatch, tmp_path):
    """Forgets what this process alone knows; what is written down is in ``tmp_path``."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def start():
        monkeypatch.setattr("srpo_cli.trust._this_process", set())

    start()
    return start


@pytest.fixture
def file(tmp_path, another_process):
    path = tmp_path / "judge.py"
    path.write_text("a = 1\n")
    return path


@pytest.fixture
def noted(tmp_path):
    return tmp_path / "config" / "srpo" / "trusted.json"


def test_an_unknown_file_is_asked_about(file, noted):
    for look in (check_trusted, read_trusted):
        with pytest.raises(UsageError, match=r"judge.py is Python code that would run here: read it, then add --trust"):
            look(file)
    assert not noted.exists()


def test_it_is_asked_once(file, another_process):
    trust(file)
    another_process()
    assert read_trusted(file) == (b"a = 1\n", check_trusted(file))


def test_an_edit_is_asked_about_again_and_so_is_its_undoing(file, another_process):
    trust(file)
    file.write_text("a = 2\n")
    with pytest.raises(UsageError, match="has changed since you trusted it: read it again"):
        check_trusted(file)
    trust(file)
    another_process()
    check_trusted(file)
    file.write_text("a = 1\n")
    with pytest.raises(UsageError, match="has changed"):
        check_trusted(file)


def test_agreement_is_for_the_content_wherever_it_lies(file, another_process):
    trust(file)
    another_process()
    moved = file.rename(file.with_name("other.py"))
    check_trusted(moved)


def test_to_agree_is_not_to_remember(file):
    assert check_trusted(file, agreed=True)
    with pytest.raises(UsageError):
        check_trusted(file)


def test_the_list_holds_one_digest_a_path_and_is_the_users_own(file, noted):
    other = file.with_name("a\nb.py")
    other.write_text("b = 1\n")
    for content in ("a = 1\n", "a = 2\n", "a = 2\n"):
        file.write_text(content)
        trust(file)
        trust(other)
    assert json.loads(noted.read_text()) == {str(file): check_trusted(file), str(other): check_trusted(other)}
    assert stat.S_IMODE(noted.stat().st_mode) == 0o600
    assert list(noted.parent.iterdir()) == [noted]


def test_where_nothing_can_be_written_it_is_asked_in_every_process(file, tmp_path, another_process):
    (tmp_path / "config").touch()
    trust(file)
    check_trusted(file)
    another_process()
    with pytest.raises(UsageError, match="asked once"):
        check_trusted(file)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_damaged_list_trusts_nothing_and_is_replaced(content, file, noted, another_process):
    noted.parent.mkdir(parents=True)
    noted.write_text(content)
    with pytest.raises(UsageError, match="asked once"):
        check_trusted(file)
    trust(file)
    another_process()
    check_trusted(file)


def test_a_file_that_is_not_there(tmp_path, another_process):
    with pytest.raises(UsageError, match=r"cannot read the plug-in .*none.py: No such file or directory"):
        check_trusted(tmp_path / "none.py")
