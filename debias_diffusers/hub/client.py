"""The Hugging Face Hub: who we are there, what is fetched from it, and what its answers mean. No torch.

`user/name@revision` names a repository at a branch, tag or commit. What is made from a repository writes it down with the
commit (`pinned`), so that the same name means the same files for ever. `python -m debias_diffusers.hub push RUN` publishes.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..config.hub_names import COMMIT
from ..config.schema import HubConfig
from ..errors import HubError, InputError, shortened
from ..utils.console import say

if TYPE_CHECKING:
    from huggingface_hub import HfApi

from ..config.hub_names import split

T = TypeVar("T")

TIMEOUT = 60.0  # seconds for one exchange with the server; the client's own are without end
PREFLIGHT = 5.0  # seconds that a training waits at its start to learn that it may push
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds between five tries of one request
LONGEST_WAIT = 300.0  # seconds that we wait because the server asks for it
MODEL_INDEX, WEIGHTS = "model_index.json", "diffusion_pytorch_model"
AGAIN = {408, 409, 412, 425, 429}  # of the 4xx: another commit came first, or the server has no time


class UnreachableError(HubError):
    """No answer of the Hub: it, or this machine, is off the network."""


# ---- asking ----------------------------------------------------------------------------------------------------------


@functools.cache
def api() -> HfApi:
    """The client, with a limit to how long it waits, and no bars of its own.

    Raises:
        HubError: the token cannot be one. (The client would quote it in its error.)
    """
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    usual = huggingface_hub.get_session()
    hooks = {**usual.event_hooks, "request": [*usual.event_hooks["request"], _limited]}
    options: dict[str, Any] = {"event_hooks": hooks, "follow_redirects": True, "timeout": TIMEOUT}
    huggingface_hub.set_client_factory(functools.partial(type(usual), **options))
    disable_progress_bars()
    token = huggingface_hub.get_token()
    if token and not re.fullmatch(r"[!-~]+", token):
        raise HubError("the Hub's token (HF_TOKEN, or that of `hf auth login`) has characters that no token has; copy it anew")
    return huggingface_hub.HfApi(token=token)


def _limited(request: Any) -> None:
    """A limit for each phase of a request that has none: some of the client's calls ask for none, whatever it was set up with."""
    request.extensions["timeout"] = {phase: seconds or TIMEOUT for phase, seconds in request.extensions["timeout"].items()}


def retried(ask: Callable[[], T], what: str, waits: tuple[float, ...] = WAITS) -> T:
    """What `ask` returns, asked again after each of `waits` (seconds) where an error may pass.

    The client raises whatever its transports do (httpx, hf_xet, OSError, RuntimeError), so every exception counts.

    Raises:
        HubError: the Hub says no.
        UnreachableError: the last try failed, too; says so.
    """
    for wait in (*waits, None):
        try:
            return ask()
        except (HubError, TypeError, AttributeError, NameError, AssertionError):  # the latter are mistakes of ours
            raise
        except Exception as error:
            if sentence := refusal(error):
                raise HubError(f"{what}: {sentence}") from error
            if wait is None or _is_offline(error):
                tries = f" (tried {len(waits) + 1} times)" if wait is None else ""
                raise UnreachableError(f"{what}: {said(error)}{tries}") from error
            seconds = max(wait, _asked_for(error))
            say(f"{what}: {said(error)}; trying again in {seconds:g} s")
            time.sleep(seconds)
    raise AssertionError("the last try returns or raises")


def refusal(error: BaseException) -> str | None:
    """What the Hub means by a no that stays one; None where another try may help."""
    status = _status(error)
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError | UnicodeError):  # which a proxy's page provokes
        return said(error)  # of the client, about what it is given
    if status is None or not 400 <= status < 500 or status in AGAIN:
        return None
    kind = type(error).__name__
    known = {
        "GatedRepoError": "access to it must be asked for on its page first",
        "RepositoryNotFoundError": "there is no such repository, or the token may not see it",
        "RevisionNotFoundError": "the repository has no such branch, tag or commit",
        "EntryNotFoundError": "the repository has no such file",
        "RemoteEntryNotFoundError": "the repository has no such file",
    }
    if kind in known:
        return known[kind]
    if status == 401:
        return "the Hub does not know the token; mend HF_TOKEN, or run `hf auth login`"
    if status == 403:
        return f"the token may not do this; take one that may write ({said(error)})"
    return said(error)


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error, which may be the cause of what was raised."""
    response = getattr(error, "response", None)
    if response is None and error.__cause__ is not None:
        return _status(error.__cause__)
    status: int | None = getattr(response, "status_code", None)
    return status


def _is_offline(error: BaseException) -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    return type(error).__name__ == "OfflineModeIsEnabled" or (error.__cause__ is not None and _is_offline(error.__cause__))


def _asked_for(error: BaseException) -> float:
    """Seconds of the server's Retry-After, which may stand in the cause of what was raised."""
    headers = getattr(getattr(error, "response", None), "headers", None)
    if headers is None:
        return _asked_for(error.__cause__) if error.__cause__ is not None else 0.0
    asked = headers.get("Retry-After", "")
    return min(float(asked), LONGEST_WAIT) if asked.isdecimal() else 0.0


def said(error: BaseException) -> str:
    """What an error of the client says, on one line and without the token."""
    import huggingface_hub

    text, token = str(error), huggingface_hub.get_token()
    return shortened(text.replace(token, "TOKEN") if token else text) or type(error).__name__


# ---- before a training -----------------------------------------------------------------------------------------------


def preflight(config: HubConfig) -> str:
    """Makes sure, before anything is trained, that its result can be pushed. Returns the full name of the repository.

    Raises:
        HubError: no token, or one that may not write; no such name or licence; no answer within `PREFLIGHT` seconds.
    """
    found: list[str | BaseException] = []

    def ask() -> None:
        try:
            found.append(ready(config, waits=(0.5, 1.0)))
        except BaseException as error:
            found.append(error)

    try:
        api()  # imports the client, which is not the Hub's time
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(PREFLIGHT)
        answer = found[0] if found else UnreachableError(f"no answer within {PREFLIGHT:g} s")
        if isinstance(answer, BaseException):
            raise answer
    except HubError as error:
        raise type(error)(f"push_to_hub is on, but {error}; mend this, or leave --push_to_hub out") from error
    return answer


def ready(config: HubConfig, waits: tuple[float, ...] = WAITS) -> str:
    """Makes the repository, if it is not there, and returns its full name.

    Raises:
        HubError: it may not be written to, or others may see it and should not; or as of `full_name`.
    """
    repo, private = full_name(config.hub_model_id or "", waits), config.hub_private
    if config.hub_license:
        _require_license(config.hub_license, waits)
    retried(lambda: api().create_repo(repo, private=private or None, exist_ok=True), f"making {repo}", waits)
    retried(lambda: api().auth_check(repo, write=True), f"writing to {repo}", waits)
    if private and not retried(lambda: api().model_info(repo), f"reading {repo}", waits).private:
        raise HubError(f"hub_private is on and {repo} is public; make it private on its page, or name another")
    return repo


def _require_license(name: str, waits: tuple[float, ...]) -> None:
    """Asks the Hub whether a card may name this licence: it would refuse every push."""
    from huggingface_hub import ModelCard

    retried(ModelCard(f"---\nlicense: {name}\n---\n").validate, f"hub_license is {name}, which the Hub must know", waits)


def full_name(name: str, waits: tuple[float, ...] = WAITS) -> str:
    """The repository that is meant, with the user's name.

    Raises:
        HubError: nobody is logged in, the token only reads, or the name cannot be one.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if api().token is None:
        raise HubError("nobody is logged in to the Hub; run `hf auth login`, or set HF_TOKEN")
    me = retried(api().whoami, "asking the Hub who we are", waits)
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"the token of {me['name']} only reads; make one that may write in the settings of the Hub")
    repo = name if "/" in name else f"{me['name']}/{name}"
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise HubError(f"hub_model_id is {name!r}, which no repository can be named; take letters, digits and - _ . only") from None
    return repo


# ---- fetching --------------------------------------------------------------------------------------------------------


def pinned(name: str, kind: str = "model") -> str:
    """`user/name` or `user/name@revision` as `user/name@commit`, with the commit that it stands for now.

    Without an answer of the Hub the newest commit in the cache is taken, and it is said that this may not be the newest.

    Args:
        name: of a repository.
        kind: model or dataset.

    Raises:
        HubError: there is none of that name, or it may not be seen; nor an answer nor anything in the cache.
    """
    repo, revision = split(name)
    if revision and COMMIT.fullmatch(revision):
        return name
    where = f"asking the Hub for {kind} {name}, as there is no such folder here"
    try:
        info = retried(lambda: api().repo_info(repo, revision=revision, repo_type=kind), where, WAITS[:2])
    except UnreachableError as error:
        if kind == "dataset":  # datasets has a cache of its own
            say(f"warning: {error}; what the cache has of {name} may not be its newest")
            return name
        commit = _cached_commit(repo, revision)
        if commit is None:
            raise
        say(f"warning: {error}; it is taken from the cache as of commit {commit}, which may not be its newest")
        return f"{repo}@{commit}"
    if kind == "model":  # under its branch or tag, for when there is no answer
        retried(functools.partial(_snapshot, repo, revision, [MODEL_INDEX]), f"fetching {name}")
    return f"{repo}@{info.sha}"


def _cached_commit(repo: str, revision: str | None) -> str | None:
    """What the cache has under a branch or tag."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _snapshot(repo, revision, [MODEL_INDEX], local_files_only=True).name
    except LocalEntryNotFoundError:
        return None


def _snapshot(repo: str, revision: str | None, patterns: list[str], **options: Any) -> Path:
    """The folder of the cache that has these files; its name is the commit."""
    from huggingface_hub import snapshot_download

    api()  # sets the client up
    return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, **options))


def fetched(name: str, variant: str | None = None, allow_pickle: bool = False) -> Path:
    """A folder with the model of a repository: configurations, and weights as safetensors.

    Args:
        name: of a repository, pinned or not.
        variant: of the weights, such as ema_0_999; the plain ones if left out.
        allow_pickle: fetch .bin weights, too.

    Raises:
        HubError: as of `pinned`; or a file could not be fetched.
        InputError: it has other weights than safetensors only, and they are not wanted.
    """
    name = pinned(name)
    stem = f"*{WEIGHTS}.{variant}" if variant else f"*{WEIGHTS}"
    # A star stands for folders, too; weights of many files have their numbers after the stem.
    kinds = ["safetensors", *(["bin"] if allow_pickle else [])]
    folder = fetched_files(name, ["*.json", *(f"{stem}{part}.{kind}" for part in ("", "-*-of-*") for kind in kinds)])
    if not allow_pickle and not any(folder.rglob(f"{WEIGHTS}*")):
        repo, commit = split(name)
        there = retried(lambda: api().list_repo_files(repo, revision=commit), f"reading {name}")
        weights = [file for file in there if Path(file).name.startswith(WEIGHTS)]
        if weights and not any(file.endswith(".safetensors") for file in weights):
            raise bin_refused(name, weights[0])
    return folder


def fetched_files(name: str, patterns: list[str]) -> Path:
    """A folder with those files of a repository whose names match; raises as `pinned`."""
    repo, commit = split(pinned(name))
    return retried(functools.partial(_snapshot, repo, commit, patterns), f"fetching {name}", WAITS[:2])


def bin_refused(model: str, file: str) -> InputError:
    """Why weights are not read that are not safetensors."""
    return InputError(
        f"model {model} has no safetensors but {file}, a format that can hold code; add --allow_pickle_import to read its tensors alone"
    )
