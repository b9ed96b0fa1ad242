"""What every test shares: no network, one thread, a plain terminal, and ``srpo`` as a function."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

# Before anything imports torch or the Hub client. A second thread gains nothing at the miniature's sizes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def srpo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run ``srpo`` with the given arguments in this process."""
    from srpo_cli.cli.app import main

    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")

    def run(*arguments: str) -> Outcome:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), output.out, output.err)

    return run


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Callable[..., "Chrome"]]:
    """Make real headless Chromiums, each with a profile of its own; ``width``, ``height`` in px, ``dark`` the scheme.

    Where there is no Chromium the test is skipped, on CI it fails.
    """
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (chromium and driver):
        message = "needs chromium and chromedriver (on Debian: apt-get install chromium chromium-driver)"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    opened: list[webdriver.Chrome] = []

    def open_one(width: int = 1280, height: int = 900, dark: bool = False) -> webdriver.Chrome:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        flags = ["headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", "disable-sync"]
        flags += ["disable-background-networking", "disable-component-update"]
        for flag in [*flags, f"user-data-dir={tmp_path / f'chromium-{len(opened)}'}"]:
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        made = webdriver.Chrome(options=options, service=Service(driver))
        opened.append(made)
        made.execute_cdp_cmd(  # the window cannot be narrower than 500 px, the page can
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        made.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        return made

    yield open_one
    for each in opened:
        with suppress(Exception):  # it may have crashed, and the others still have to go
            each.quit()
