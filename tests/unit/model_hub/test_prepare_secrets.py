"""Tokens and passwords are written nowhere: the prepare stage runs with real-looking ones, then every byte is searched."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.hub.server import HubServer
from tests.unit.data import stage
from tests.unit.data.stage import result
from tests.unit.model_hub.conftest import DATA, MODEL

from afina.recipe.schema import Recipe
from afina.redact import looks_secret, redact
from afina.run.plan import Plan, make_plan
from afina.site.settings import Site

#: They look real and belong to nobody.
HF = "hf_" + "qWeRtYuIoPaSdFgHjKlZxCvBnM12345678"
SECRETS = {
    "HF_TOKEN": HF,
    "WANDB_API_KEY": "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c",
    "AWS_SECRET": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYzz",
    "MY_DB_PASSWORD": "correct horse battery",
    "HUGGING_FACE_HUB_TOKEN": HF,
}
PASSWORD = "pr0xy-p4ssw0rd"


@pytest.fixture
def run(site: Site, hub: HubServer, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the stage and searches its files and output."""
    hub.tokens.add(HF)

    def prepare(**env: str) -> subprocess.CompletedProcess[str]:
        data = {"hub": DATA, "text": "text", "label": "stars", "eval": {"split": "test"}}
        spec = {"name": "t", "model": MODEL, "data": data, "tokens": {"max_length": 64}}
        plan: Plan = make_plan(Recipe.model_validate(spec), site)
        ran = stage.prepare(plan, env={**SECRETS, **hub.env(site.cache / "huggingface"), **env})
        search(tmp_path, ran.stdout, ran.stderr)
        return ran

    return prepare


def search(folder: Path, *texts: str) -> int:
    """Fails where a secret is found; returns how many files were searched."""
    needles = [value.encode() for value in (*set(SECRETS.values()), PASSWORD)]
    files = [path for path in folder.rglob("*") if path.is_file()]
    for where, content in [(f, f.read_bytes()) for f in files] + [("output", t.encode()) for t in texts]:
        found = [needle for needle in needles if needle in content]
        assert not found, f"{found} in {where}"
    return len(files)


def test_no_file_holds_a_secret(
    run: Callable[..., subprocess.CompletedProcess[str]], hub: HubServer, tmp_path: Path, site: Site
) -> None:
    """With libraries that log all they can; then again, quietly."""
    ran = run(HF_DEBUG="1", HF_HUB_VERBOSITY="debug")
    prepared = result(ran)
    assert any(request.authorization == f"Bearer {HF}" for request in hub.requests), "the token was used"
    assert search(Path(prepared["prepared"])) > 8 and search(site.scratch) > 20
    assert result(run())["reused"] is True
    # The search finds what it looks for.
    (tmp_path / "planted").write_text(f"x{HF}x")
    with pytest.raises(AssertionError, match="planted"):
        search(tmp_path)


@pytest.mark.parametrize(
    "env",
    [
        {"HF_ENDPOINT": f"http://me:{PASSWORD}@127.0.0.1:9"},
        {"HF_ENDPOINT": f"http://me:{PASSWORD}@[bad"},
        {"HF_ENDPOINT": "https://hub.invalid", "HTTPS_PROXY": f"http://me:{PASSWORD}@127.0.0.1:9", "NO_PROXY": ""},
        {"HF_ENDPOINT": "https://hub.invalid", "HTTPS_PROXY": f"nonsense://me:{PASSWORD}@127.0.0.1:9", "NO_PROXY": ""},
        {"HF_HOME": f"/proc/{HF}"},
        {"HF_TOKEN": HF + "expired"},
    ],
    ids=["closed", "no url", "proxy", "no proxy", "in a path", "wrong token"],
)
def test_failures_show_no_secret(run: Callable[..., subprocess.CompletedProcess[str]], env: dict[str, str]) -> None:
    ran = run(**env)
    assert ran.returncode != 0 and (ran.stderr or ran.stdout)


def test_what_is_redacted() -> None:
    env = {
        **SECRETS,
        "SHORT_KEY": "abc",
        "EMPTY_TOKEN": "",
        "TOKENIZERS_PARALLELISM": "true",
        "HF_TOKEN_PATH": "/a/path",
    }
    text = f"GET https://me:pw@host/x?y and {HF}! {SECRETS['AWS_SECRET']} abc true /a/path me@host"
    assert redact(text, env) == "GET https://***@host/x?y and ***! *** abc true /a/path me@host"
    assert redact(f"http://{HF}@hub/ of http://hub:8080/a@b", {}) == "http://***@hub/ of http://hub:8080/a@b"
    assert redact("one: verylongsecret, another: verylong", {"A_KEY": "verylong", "B_KEY": "verylongsecret"}) == (
        "one: ***, another: ***"
    )
    assert looks_secret({"a": [1, {"b": (HF,)}]}) and looks_secret({HF: 1}) and looks_secret("x://a:b@c")
    assert not looks_secret(["hf_short", 5, None, "https://host/path", "a@b.c"])
