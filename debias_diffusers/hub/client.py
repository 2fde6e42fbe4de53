"""The client of the Hugging Face Hub: time limits, retries, error messages, access checks, downloads. No torch.

`user/name@revision` names a repository at a branch, tag or commit. What is made from a repository records the commit
(`pinned`), so that the same name means the same files for ever. `python -m debias_diffusers.hub push RUN` publishes.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # the builtin one since Python 3.11
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..config.hub_names import COMMIT, hub_file, is_model_id, split_revision
from ..config.schema.hub import HubConfig
from ..errors import HubError, InputError, no_client, shortened
from ..runs.model_folder import MODEL_INDEX, task_of
from ..runs.part_files import HALF
from ..utils.console import say

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

TIMEOUT = 60.0  # seconds for each phase of a request (connect, send, receive); huggingface_hub has no limit
PREFLIGHT = 5.0  # seconds for the access check before a training
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds between the five attempts of a request
MAX_RETRY_AFTER = 300.0  # seconds of a server's Retry-After; a longer one is cut
WEIGHTS = "diffusion_pytorch_model"
RETRIED = {408, 409, 412, 425, 429}  # of the 4xx: another commit came first, or the server is busy


class UnreachableError(HubError):
    """No answer from the Hub: it is down, or there is no network."""


# ---- requests --------------------------------------------------------------------------------------------------------


@functools.cache
def api() -> HfApi:
    """The client of huggingface_hub, with time limits and without progress bars.

    Raises:
        HubError: the token has characters that no token has (huggingface_hub would quote it in its error); or a proxy or a file of
            certificates in the environment is none.
    """
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    try:
        default = huggingface_hub.get_session()
    except Exception as error:  # ImportError of a SOCKS proxy without its package, ValueError, OSError, InvalidURL
        raise HubError(f"the Hub cannot be asked: {no_client(error)}") from error
    hooks = {**default.event_hooks, "request": [*default.event_hooks["request"], _set_timeout]}
    options: dict[str, Any] = {"event_hooks": hooks, "follow_redirects": True, "timeout": TIMEOUT}
    huggingface_hub.set_client_factory(functools.partial(type(default), **options))
    disable_progress_bars()
    token = huggingface_hub.get_token()
    if token and not re.fullmatch(r"[!-~]+", token):
        raise HubError("invalid token: it contains characters that no token has; set HF_TOKEN or run `hf auth login` again")
    return huggingface_hub.HfApi(token=token)


def _set_timeout(request: Any) -> None:
    """Sets a timeout for each phase of a request that has none: some methods of HfApi pass `timeout=None`, whatever the session has."""
    request.extensions["timeout"] = {phase: seconds or TIMEOUT for phase, seconds in request.extensions["timeout"].items()}


def retried(request: Callable[[], T], what: str, waits: tuple[float, ...] = WAITS) -> T:
    """What `request` returns, called again after each of `waits` (seconds) where the error may be temporary.

    huggingface_hub retries listings and uploads only. It raises the errors of its transports (httpx, hf_xet, OSError,
    RuntimeError), so every exception counts.

    Args:
        request: the call.
        what: what it does, for messages: "committing to user/name".
        waits: seconds before each further attempt; longer where the server names a time with Retry-After.

    Raises:
        HubError: the Hub refuses.
        UnreachableError: the last attempt failed, too.
    """
    for wait in (*waits, None):
        try:
            return request()
        except (HubError, TypeError, AttributeError, NameError, AssertionError):  # the latter are bugs
            raise
        except Exception as error:
            if sentence := refusal(error):
                raise HubError(f"{what}: {sentence}") from error
            if wait is None or any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in _causes(error)):
                attempts = f" (tried {len(waits) + 1} times)" if wait is None else ""
                raise UnreachableError(f"{what}: {said(error)}{attempts}") from error
            seconds = max(wait, _retry_after(error))
            say(f"{what}: {said(error)}; trying again in {seconds:g} s")
            time.sleep(seconds)
    raise AssertionError("the last attempt returns or raises")


REFUSALS = {
    "GatedRepoError": "the repository is gated; ask for access on its page",
    "RepositoryNotFoundError": "no such repository, or the token may not see it; check the name and HF_TOKEN",
    "RevisionNotFoundError": "the repository has no such branch, tag or commit",
}


def refusal(error: BaseException) -> str | None:
    """The message for an error that another attempt cannot change; None where it can."""
    response = _response(error)
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError | UnicodeError):  # these come with a proxy's HTML page
        return said(error)  # an invalid argument
    if response is None or not 400 <= response.status_code < 500 or response.status_code in RETRIED:
        return None
    if type(error).__name__ in REFUSALS:
        return REFUSALS[type(error).__name__]
    if response.status_code == 401:
        return "invalid token (401); set HF_TOKEN or run `hf auth login`"
    if response.status_code == 403:
        return f"the token may not do this (403: {said(error)}); use a token with write access"
    return said(error)


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error and the errors that it was raised from: uploads wrap the HTTP error in a RuntimeError."""
    return [error, *_causes(error.__cause__)] if error else []


def _response(error: BaseException) -> Any:
    """The HTTP response behind an error; None where there was none."""
    responses = (getattr(cause, "response", None) for cause in _causes(error))
    return next((response for response in responses if response is not None), None)


def _retry_after(error: BaseException) -> float:
    """Seconds in the Retry-After header of the response behind an error; 0 without."""
    response = _response(error)
    header = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(header), MAX_RETRY_AFTER) if header.isdecimal() else 0.0


def said(error: BaseException) -> str:
    """The message of an error on one line, without the token."""
    import huggingface_hub

    text, token = str(error), huggingface_hub.get_token()
    return shortened(text.replace(token, "TOKEN") if token else text) or type(error).__name__


# ---- access ----------------------------------------------------------------------------------------------------------


def preflight(config: HubConfig) -> str:
    """Checks before a training that its result can be pushed. Returns the full name of the repository.

    Raises:
        HubError: no token, or one without write access; an invalid name or licence; no answer within `PREFLIGHT` seconds.
    """
    result: Future[str] = Future()

    def check() -> None:
        try:
            result.set_result(ready(config, waits=(0.5, 1.0)))
        except BaseException as error:
            result.set_exception(error)

    try:
        api()  # importing huggingface_hub does not count
        # A daemon: threads of an executor (HfApi.run_as_future) would keep the process until their request has timed out.
        threading.Thread(target=check, daemon=True).start()
        return result.result(PREFLIGHT)
    except (HubError, FutureTimeoutError) as error:
        problem = error if isinstance(error, HubError) else f"the Hub gave no answer within {PREFLIGHT:g} s"
        raise HubError(f"push_to_hub is on, but {problem}; fix this, or leave --push_to_hub out") from error


def ready(config: HubConfig, waits: tuple[float, ...] = WAITS) -> str:
    """Creates the repository, if it does not exist, and returns its full name.

    Raises:
        HubError: not logged in, no write access, an invalid name or licence, or it is public and should be private.
    """
    from huggingface_hub import ModelCard

    if api().token is None:
        raise HubError("not logged in to the Hub; run `hf auth login`, or set HF_TOKEN")
    user = retried(api().whoami, "asking the Hub whose token this is", waits)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"the token of {user['name']} is read-only; create one with write access in the settings of the Hub")
    name, license, private = config.hub_model_id or "", config.hub_license, config.hub_private
    repo = name if "/" in name else f"{user['name']}/{name}"
    if license:  # the Hub refuses every commit of a card that names an unknown one
        card = ModelCard(f"---\nlicense: {license}\n---\n")
        retried(card.validate, f"hub_license is {license}, which the Hub must know", waits)
    retried(lambda: api().create_repo(repo, private=private or None, exist_ok=True), f"creating hub_model_id {name!r}", waits)
    retried(lambda: api().auth_check(repo, write=True), f"checking write access to {repo}", waits)
    if private and not retried(lambda: api().model_info(repo), f"reading {repo}", waits).private:
        raise HubError(f"hub_private is on and {repo} is public; make it private on its page, or name another repository")
    return repo


# ---- downloads -------------------------------------------------------------------------------------------------------

_taken_from_cache: set[str] = set()  # user/name@commit, as the Hub could not be reached


def pinned(name: str, kind: str = "model") -> str:
    """`user/name` or `user/name@revision` as `user/name@commit`, with the commit that the revision has now.

    Where the Hub cannot be reached, the newest commit in the cache is taken, with a warning that there may be a newer one.

    Args:
        name: user/name or user/name@revision; or hf://datasets/user/name/path, of files in a data set.
        kind: model or dataset.

    Raises:
        HubError: no such repository, or no access to it; or the Hub cannot be reached and the cache has nothing.
    """
    if file := hub_file(name):
        return file.at(split_revision(pinned(f"{file.repo}@{file.revision}" if file.revision else file.repo, "dataset"))[1])
    repo, revision = split_revision(name)
    if revision and COMMIT.fullmatch(revision):
        return name
    where = f"asking the Hub for {kind} {name}, as there is no such folder here"
    try:
        info = retried(lambda: api().repo_info(repo, revision=revision, repo_type=kind), where, WAITS[:2])
    except UnreachableError as error:
        if kind == "dataset":  # the datasets library has a cache of its own
            say(f"warning: {error}; what the cache has of {name} may not be its newest")
            return name
        commit = _cached(repo, revision, [MODEL_INDEX], error).name
        say(f"warning: {error}; it is taken from the cache as of commit {commit}, which may not be its newest")
        _taken_from_cache.add(found := f"{repo}@{commit}")
        return found
    if kind == "model":  # into the cache under its branch or tag, for a later start without the Hub
        retried(functools.partial(_download, repo, revision, [MODEL_INDEX]), f"downloading {name}")
    return f"{repo}@{info.sha}"


def _download(repo: str, revision: str | None, patterns: list[str], **options: Any) -> Path:
    """The folder in the cache with the files that match; its name is the commit."""
    from huggingface_hub import snapshot_download

    api()  # sets the time limits
    return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, **options))


def _cached(repo: str, revision: str | None, patterns: list[str], error: UnreachableError) -> Path:
    """As `_download`, of the cache alone; raises `error` where it has nothing."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _download(repo, revision, patterns, local_files_only=True)
    except LocalEntryNotFoundError:
        raise error from None


def download_model(name: str, variant: str | None = None, allow_pickle: bool = False) -> Path:
    """A folder with the model of a repository: configurations, and weights as safetensors.

    Args:
        name: user/name or user/name@revision.
        variant: of the weights, such as ema_0_999; if left out the default weights, or those in fp16 where there are no others.
        allow_pickle: download .bin weights, too.

    Raises:
        HubError: as of `pinned`; or a download failed.
        InputError: it has .bin weights only, without `allow_pickle`.
    """
    name = pinned(name)
    kinds = ["safetensors", *(["bin"] if allow_pickle else [])]
    # Sharded weights have numbers after the stem. The UNet of a pixel model may lie in the root.
    stems = [*(f"{folder}{WEIGHTS}{f'.{variant}' if variant else ''}" for folder in ("", "unet/")), f"vae/{WEIGHTS}", "text_encoder*/model"]
    weights = [f"{stem}{part}.{kind}" for stem in stems for part in ("", "-*-of-*") for kind in kinds]
    folder = download_files(name, ["*.json", "tokenizer*/*.txt", *weights])
    if not allow_pickle and (halves := [f"{stem}.{HALF}.safetensors" for stem in _without_weights(folder)]):
        folder = download_files(name, halves)
    if not allow_pickle and not any(folder.rglob(f"{WEIGHTS}*")):
        repo, commit = split_revision(name)
        there = retried(lambda: api().list_repo_files(repo, revision=commit), f"reading {name}")
        weights = [file for file in there if Path(file).name.startswith(WEIGHTS)]
        if weights and not any(file.endswith(".safetensors") for file in weights):
            raise text_bin_refused(name, weights[0]) if task_of(folder) == "text_to_image" else bin_refused(name, weights[0])
    return folder


def _without_weights(folder: Path) -> list[str]:
    """The names, without endings, that the weights of parts would have which have none in the folder of a model."""
    parts = {"": WEIGHTS, "unet/": WEIGHTS, "vae/": WEIGHTS, "text_encoder/": "model", "text_encoder_2/": "model"}
    lacking = [part for part in parts if (folder / part / "config.json").is_file() and not any((folder / part).glob("*.safetensors"))]
    return [part + parts[part] for part in lacking]


def configurations(model: str, *more: str) -> Path:
    """A folder with the configuration files of a model: its own, or what is downloaded of a Hub id; raises as `pinned`.

    `more` are patterns of other files to download.
    """
    return download_files(model, ["*.json", *more]) if is_model_id(model) else Path(model)


def download_files(name: str, patterns: list[str]) -> Path:
    """A folder with the files of a repository whose names match; raises as `pinned`."""
    repo, commit = split_revision(name := pinned(name))
    try:
        return retried(functools.partial(_download, repo, commit, patterns), f"downloading {name}", WAITS[:2])
    except UnreachableError as error:
        if name not in _taken_from_cache:
            raise
        return _cached(repo, commit, patterns, error)  # huggingface_hub below 2 does so for some errors of the connection only


def bin_refused(model: str, file: str) -> InputError:
    """The error for a model without safetensors weights."""
    return InputError(
        f"model {model} has no safetensors but {file}, a format that can contain code; add --allow_pickle_import to read its tensors only"
    )


def text_bin_refused(model: str, file: str) -> InputError:
    """The error for a text-to-image model without safetensors weights."""
    return InputError(
        f"model {model} has no safetensors but {file}, a format that can contain code; text-to-image models are read from safetensors "
        f"only: save it with diffusers' save_pretrained, or take another"
    )
