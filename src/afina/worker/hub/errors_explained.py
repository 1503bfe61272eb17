"""Errors of the Hub and its libraries as one message with a remedy; retries and bounded waits.

Errors of huggingface_hub and datasets are recognised by class; where they have no class, by name and text.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from afina.errors import AfinaError, EnvironmentProblem, HubError, InputError, RecipeError, first_line, nearest

__all__ = ["LONGEST_WAIT", "PREFETCH", "refuse_long_waits", "hub_errors", "retry_resets", "retry_after"]

#: Seconds. huggingface_hub sleeps as long as a 429 asks for, up to five times, and the Hub's window is 300 s. A longer wait is
#: the user's decision.
LONGEST_WAIT = 10
#: A compute node has no internet and depends on an earlier fetch.
PREFETCH = "run `afina prefetch RECIPE` on a node with internet (often the login node), with the same AFINA_SCRATCH"

#: Names of classes of httpx, urllib3 and requests: a transfer that broke off, and a connection that was never made.
_BROKEN_TRANSFER = {"RemoteProtocolError", "ReadError", "ReadTimeout", "IncompleteRead"}
_NO_CONNECTION = {"ConnectError", "ConnectTimeout", "TimeoutException", "ConnectionError", "ProxyError", "gaierror"}

E = TypeVar("E", bound=BaseException)


def retry_resets(call: Callable[[], Any]) -> Any:
    """Retry after a reset connection, which huggingface_hub does not; complete files are not fetched again."""
    for pause in (1, 3):
        try:
            return call()
        except Exception as error:
            if not any(type(e).__name__ == "ReadError" for e in _chain(error)):
                raise
            time.sleep(pause)
    return call()


def refuse_long_waits() -> None:
    """Raise at once where the Hub asks for a long wait, instead of sleeping."""
    import huggingface_hub

    session = huggingface_hub.get_session()
    hooks = session.event_hooks
    if _refuse_long_wait not in hooks["response"]:
        session.event_hooks = {**hooks, "response": [*hooks["response"], _refuse_long_wait]}


def _refuse_long_wait(response: Any) -> None:
    if response.status_code != 429:
        return
    wait = retry_after(response.headers)
    if wait is not None and wait > LONGEST_WAIT:
        raise _rate_limited(wait)


def retry_after(headers: Any) -> int | None:
    """Seconds until the Hub accepts requests again: `Retry-After`, or `t=` of the `RateLimit` header."""
    match = re.fullmatch(r"\s*(\d+)\s*", headers.get("retry-after", "")) or re.search(
        r"\bt=(\d+)", headers.get("ratelimit", "")
    )
    return int(match[1]) if match else None


def _rate_limited(wait: int | None) -> HubError:
    after = f"in {wait} s" if wait is not None else "in a few minutes"
    anonymous = "" if _token() else "; with HF_TOKEN (or `hf auth login`) the limit is higher"
    return HubError("the Hub limits the rate of requests (429)", f"run the same command again {after}{anonymous}")


@contextlib.contextmanager
def hub_errors(kind: str, name: str, revision: str | None) -> Iterator[None]:
    """Turn any error of the Hugging Face libraries into one message with a remedy.

    Args:
        kind: "model" or "dataset".

    Raises:
        AfinaError: see `_explain`. A full disk stays an OSError, an unknown error what it is.
    """
    try:
        yield
    except AfinaError:
        raise
    except Exception as error:
        chain = list(_chain(error))
        full = _os_error(chain, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        closed = _os_error([e for e in chain if getattr(e, "filename", None)], errno.EACCES, errno.EPERM, errno.EROFS)
        explained = _first(chain, AfinaError)
        if full is not None:
            raise full from None
        if closed is not None:
            raise EnvironmentProblem(
                f"{closed.filename}: {closed.strerror}: the cache does not hold {name}, and cannot be written",
                "unset HF_HOME (caches then go below AFINA_SCRATCH), or let its owner run `afina prefetch RECIPE`",
            ) from None
        explained = explained or _explain(chain, kind, name, revision)
        if explained is None:
            raise
        raise explained from None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _first(chain: Sequence[BaseException], kind: type[E]) -> E | None:
    return next((e for e in chain if isinstance(e, kind)), None)


def _os_error(chain: Sequence[BaseException], *numbers: int) -> OSError | None:
    return next((e for e in chain if isinstance(e, OSError) and e.errno in numbers), None)


def _explain(chain: Sequence[BaseException], kind: str, name: str, revision: str | None) -> AfinaError | None:
    """An error about access or naming by the Hub's answer, else one about the connection or the data; None: unknown."""
    what = f"{'data set' if kind == 'dataset' else kind} {name}"
    text = " ".join(str(e) for e in chain)
    return (
        _explain_access(chain, text, what, kind, name, revision)
        or _explain_status(chain, what)
        or _explain_connection(chain, text, what)
        or _explain_content(chain, text, what, kind)
    )


def _explain_access(
    chain: Sequence[BaseException], text: str, what: str, kind: str, name: str, revision: str | None
) -> AfinaError | None:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    token = "with the token in use" if _token() else "without a token"
    status = _status(chain)
    if _first(chain, errors.GatedRepoError) or "is a gated dataset" in text:
        return HubError(
            f"{what} is gated: its owner admits only those who accepted its terms (asked {token})",
            f"accept them on {page}, then set HF_TOKEN to a token of that account (or `hf auth login`)",
        )
    if _first(chain, errors.RevisionNotFoundError):
        key = "revision" if kind == "model" else "data.revision"
        return RecipeError(f"{key}: {what} has no revision `{revision}`", _known_revisions(kind, name, revision or ""))
    if status == 401 and _token() and "invalid" in text.lower():
        return HubError(f"{what}: the Hub refuses your token (401)", "set HF_TOKEN to a valid one, or unset it")
    if _first(chain, errors.RepositoryNotFoundError) or status == 404:
        return HubError(
            f"there is no {what} on the Hub, or it is private (asked {token})",
            f"check the spelling on {page}; for a private one set HF_TOKEN (or `hf auth login`)",
        )
    if invalid := _first(chain, errors.HFValidationError):
        return InputError(f"{what}: not a Hub id: {first_line(invalid)}", "an id is `owner/name`; a folder must exist")
    if status in (401, 403):
        return HubError(f"{what}: the Hub refuses access ({status}, asked {token})", f"see {page}; set HF_TOKEN")
    return None


def _explain_status(chain: Sequence[BaseException], what: str) -> AfinaError | None:
    status = _status(chain)
    if status == 429:
        headers = (r.headers for e in chain if (r := getattr(e, "response", None)) is not None)
        return _rate_limited(next(map(retry_after, headers), None))
    if status is not None and status >= 500:
        return HubError(
            f"{what}: the Hub reports an error ({status})", "run the same command again later: status.huggingface.co"
        )
    return None


def _explain_connection(chain: Sequence[BaseException], text: str, what: str) -> AfinaError | None:
    from huggingface_hub import errors

    if _first(chain, errors.OfflineModeIsEnabled) or os.environ.get("HF_HUB_OFFLINE") == "1":
        return HubError(f"{what} is not on this machine, and HF_HUB_OFFLINE=1 forbids fetching it", PREFETCH)
    classes = {base.__name__ for e in chain for base in type(e).__mro__}
    if classes & _BROKEN_TRANSFER or "onsistency check" in text:
        return HubError(f"{what}: the transfer broke off", "run the same command again; it resumes where it stopped")
    if classes & _NO_CONNECTION:
        return HubError(f"{what}: the Hub cannot be reached from this machine", PREFETCH)
    return None


def _explain_content(chain: Sequence[BaseException], text: str, what: str, kind: str) -> AfinaError | None:
    from huggingface_hub import errors

    by_datasets = kind == "dataset" and any(type(e).__module__.startswith(("datasets", "pyarrow")) for e in chain)
    if by_datasets or "script" in text:
        return InputError(
            f"{what}: datasets cannot load it: {first_line(chain[0])}",
            "see its page; often `revision: refs/convert/parquet` helps, or download it and name `data.files`",
        )
    if _first(chain, errors.LocalEntryNotFoundError):
        return HubError(f"{what}: the Hub cannot be reached from this machine", PREFETCH)
    if _first(chain, errors.HfHubHTTPError):
        return HubError(
            f"{what}: the Hub answers {_status(chain)}: {first_line(chain[0])}", "run the same command again later"
        )
    return None


def _status(chain: Sequence[BaseException]) -> int | None:
    statuses = (getattr(getattr(error, "response", None), "status_code", None) for error in chain)
    return next((status for status in statuses if isinstance(status, int)), None)


def _token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _known_revisions(kind: str, name: str, revision: str) -> str:
    """The known revisions, nearest first, by one more request; if it fails, general advice."""
    import huggingface_hub

    try:
        refs = huggingface_hub.HfApi().list_repo_refs(name, repo_type=kind)
    except Exception:
        return "leave `revision` out for the newest, or give a branch, a tag or a commit of 40 hex digits"
    known = [ref.name for ref in (*refs.branches, *refs.tags)]
    hint = nearest(revision, known)
    return f"{hint + ' ' if hint else ''}known: {', '.join(known[:20])}; or a commit of 40 hex digits"
