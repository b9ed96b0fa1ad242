"""Reward: what a vision-language model says of a picture, behind an OpenAI-style endpoint such as vLLM's.

    vllm serve CodeGoat24/UnifiedReward-2.0-qwen3vl-8b --port 8000      # in an environment of its own
    JUDGE_URL=http://localhost:8000/v1 srpo score images/ --reward served_judge.py --trust

JUDGE_URL is where pictures and prompts are sent; JUDGE_MODEL is the model asked for, the server's first if not set;
JUDGE_KEY is sent as a bearer token if set. The question is this file's own: put the judge's own in its place where
its published figures are to be met.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from torchvision.transforms.functional import to_pil_image

from srpo_cli.errors import MissingError, SrpoError, UsageError
from srpo_cli.rewards.base import Reward

QUESTION = """Judge this picture, which was generated from the text "{prompt}".
How well does it show what the text says, and how good is it as a picture?
End with one line "Final Score: x", x being a number from 1 (worst) to 5 (best)."""
ANSWER = re.compile(r"final score\W*?(-?\d+(?:\.\d+)?)", re.IGNORECASE)
LOWEST, HIGHEST = 1, 5
TIMEOUT = 120  # seconds for one answer
ATTEMPTS = 3  # for one picture, where the server is busy or cannot be reached
PAUSE = 1.0  # seconds before the second attempt, twice that before the third
AT_ONCE = 8  # pictures in flight, so that the server can batch them


class ServedJudge(Reward):
    """A score from 1 to 5 that a served model writes about a picture and its prompt."""

    unit = "1 to 5"
    differentiable = False  # it can score, it cannot train

    def __init__(self, url: str, model: str | None, key: str | None) -> None:
        self.url = url.rstrip("/")
        self.headers = {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self.model = model or self._ask("models")["data"][0]["id"]
        self.weights = f"{self.model} at {self.url}"

    def __call__(self, images, prompts):
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return torch.tensor(list(pool.map(self._judge, images, prompts)), dtype=torch.float32)

    def _judge(self, image: torch.Tensor, prompt: str) -> float:
        """The score of one picture (3, H, W); an answer without one is an error, never a number."""
        file = io.BytesIO()
        to_pil_image((image.detach().float().clamp(0, 1) * 255).round().byte().cpu()).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": QUESTION.format(prompt=prompt)},
        ]
        message = {"role": "user", "content": content}
        answer = self._ask(
            "chat/completions", {"model": self.model, "messages": [message], "temperature": 0, "max_tokens": 512}
        )
        try:
            text = answer["choices"][0]["message"]["content"]
            score = float(ANSWER.findall(text)[-1])
        except (KeyError, IndexError, TypeError) as error:
            raise SrpoError(f"{self.url} answered without a score: {json.dumps(answer)[:120]}") from error
        if not LOWEST <= score <= HIGHEST:
            raise SrpoError(f"{self.url} answered with the score {score:g}: it is from {LOWEST} to {HIGHEST}")
        return score

    def _ask(self, path: str, body: dict | None = None) -> dict:
        """The JSON that the server answers with; a busy or absent server is asked again, a refusal stands."""
        request = Request(f"{self.url}/{path}", body and json.dumps(body).encode(), self.headers)
        for attempt in range(ATTEMPTS):
            try:
                with urlopen(request, timeout=TIMEOUT) as response:
                    return json.load(response)
            except HTTPError as error:
                reason, again = f"{error.code} {error.reason}", error.code == 429 or error.code >= 500
            except json.JSONDecodeError as error:
                reason, again = f"no JSON ({error})", False
            except (URLError, OSError, HTTPException) as error:
                reason, again = str(getattr(error, "reason", None) or error or type(error).__name__), True
            if not again:
                break
            if attempt + 1 < ATTEMPTS:
                time.sleep(PAUSE * 2**attempt)
        raise SrpoError(f"{self.url}/{path}: {reason}, after {attempt + 1} attempt(s)")


def load(name, weights, device, dtype, announce=None):
    """What srpo calls: the reward, ready to be asked."""
    if weights is not None:
        raise UsageError(f"{name} takes no weights: its model is the server's, JUDGE_MODEL names it")
    url = os.environ.get("JUDGE_URL", "")
    if not url.startswith(("http://", "https://")):
        raise MissingError(f"{name} needs a server, JUDGE_URL is {url!r}: set it, as in http://localhost:8000/v1")
    return ServedJudge(url, os.environ.get("JUDGE_MODEL"), os.environ.get("JUDGE_KEY"))
