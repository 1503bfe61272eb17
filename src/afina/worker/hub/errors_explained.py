"""What the Hub and its libraries say when they say no, as one message with a remedy; and how long to be patient.

Knows huggingface_hub's and datasets' errors by their classes, and where they have none of their own, by name and text.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from afina.errors import AfinaError, EnvironmentProblem, HubError, InputError, RecipeError, nearest

__all__ = ["LONGEST_WAIT", "PREFETCH", "bound_waits", "hub_errors", "persist", "wait_of"]

#: huggingface_hub sleeps as long as a 429 tells it to, five times over; the Hub's window is 300 s. A longer wait than
#: this many seconds is for the user to decide on.
LONGEST_WAIT = 10
#: A compute node has no internet; it must find what a node with internet left.
PREFETCH = "run `afina prefetch RECIPE` on a node with internet (often the login node), with the same AFINA_SCRATCH"


def persist(call: Callable[[], Any]) -> Any:
    """Try again after a reset connection, which huggingface_hub gives up on; what is complete is not fetched twice."""
    for pause in (1, 3):
        try:
            return call()
        except Exception as error:
            if not any(type(e).__name__ == "ReadError" for e in _chain(error)):
                raise
            time.sleep(pause)
    return call()


def bound_waits() -> None:
    """Raise at once where the Hub asks for a long wait, instead of sleeping through it."""
    import huggingface_hub

    session = huggingface_hub.get_session()
    hooks = session.event_hooks
    if _refuse_long_wait not in hooks["response"]:
        session.event_hooks = {**hooks, "response": [*hooks["response"], _refuse_long_wait]}


def _refuse_long_wait(response: Any) -> None:
    if response.status_code != 429:
        return
    wait = wait_of(response.headers)
    if wait is not None and wait > LONGEST_WAIT:
        raise _rate_limited(wait)


def wait_of(headers: Any) -> int | None:
    """Seconds until the Hub listens again: `Retry-After`, or `t=` of the `RateLimit` header."""
    found = re.fullmatch(r"\s*(\d+)\s*", headers.get("retry-after", "")) or re.search(
        r"\bt=(\d+)", headers.get("ratelimit", "")
    )
    return int(found[1]) if found else None


def _rate_limited(wait: int | None) -> HubError:
    after = f"in {wait} s" if wait is not None else "in a few minutes"
    anonymous = "" if _token() else "; with HF_TOKEN (or `hf auth login`) the limit is higher"
    return HubError("the Hub limits the rate of requests (429)", f"run the same command again {after}{anonymous}")


@contextlib.contextmanager
def hub_errors(kind: str, name: str, revision: str | None) -> Iterator[None]:
    """Turn whatever the Hugging Face libraries raise into one message with a remedy."""
    try:
        yield
    except AfinaError:
        raise
    except Exception as error:
        chain = list(_chain(error))
        full = next(
            (e for e in chain if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)), None
        )
        if full is not None:
            raise full from None
        closed = next(
            (
                e
                for e in chain
                if isinstance(e, OSError) and e.filename and e.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
            ),
            None,
        )
        if closed is not None:
            raise EnvironmentProblem(
                f"{closed.filename}: {closed.strerror}: the cache does not hold {name}, and cannot be written",
                "unset HF_HOME (caches then go below AFINA_SCRATCH), or let its owner run `afina prefetch RECIPE`",
            ) from None
        ours = next((e for e in chain if isinstance(e, AfinaError)), None)
        if ours is not None:
            raise ours from None
        explained = _explain(chain, "data set" if kind == "dataset" else kind, kind, name, revision)
        if explained is None:
            raise
        raise explained from None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _explain(
    chain: Sequence[BaseException], word: str, kind: str, name: str, revision: str | None
) -> AfinaError | None:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    who = "with the token in use" if _token() else "without a token"
    text = " ".join(str(e) for e in chain)
    if _found(chain, errors.GatedRepoError) or "is a gated dataset" in text:
        return HubError(
            f"{word} {name} is gated: its owner lets in only those who accepted its terms (asked {who})",
            f"accept them on {page}, then set HF_TOKEN to a token of that account (or `hf auth login`)",
        )
    status = _status(chain)
    if _found(chain, errors.RevisionNotFoundError):
        key = "revision" if kind == "model" else "data.revision"
        return RecipeError(f"{key}: {word} {name} has no revision `{revision}`", _revisions(kind, name, revision or ""))
    if status == 401 and _token() and "invalid" in text.lower():
        return HubError(f"{word} {name}: the Hub refuses your token (401)", "set HF_TOKEN to a valid one, or unset it")
    if _found(chain, errors.RepositoryNotFoundError) or status == 404:
        return HubError(
            f"there is no {word} {name} on the Hub, or it is private (asked {who})",
            f"check the spelling on {page}; for a private one set HF_TOKEN (or `hf auth login`)",
        )
    if isinstance(bad := _found(chain, errors.HFValidationError), BaseException):
        return InputError(
            f"{word} {name}: not a Hub id: {_first_line(bad)}", "an id is `owner/name`; a folder must exist"
        )
    if status in (401, 403):
        return HubError(f"{word} {name}: the Hub refuses access ({status}, asked {who})", f"see {page}; set HF_TOKEN")
    if status == 429:
        return _rate_limited(
            next((wait_of(r.headers) for e in chain if (r := getattr(e, "response", None)) is not None), None)
        )
    if status is not None and status >= 500:
        return HubError(
            f"{word} {name}: the Hub has a fault ({status})", "run the same command again later: status.huggingface.co"
        )
    if _found(chain, errors.OfflineModeIsEnabled) or os.environ.get("HF_HUB_OFFLINE") == "1":
        return HubError(f"{word} {name} is not on this machine, and HF_HUB_OFFLINE=1 forbids to fetch it", PREFETCH)
    names = {kind.__name__ for e in chain for kind in type(e).__mro__}
    if names & {"RemoteProtocolError", "ReadError", "ReadTimeout", "IncompleteRead"} or "onsistency check" in text:
        return HubError(
            f"{word} {name}: the transfer broke off", "run the same command again; it resumes where it stopped"
        )
    if names & {"ConnectError", "ConnectTimeout", "TimeoutException", "ConnectionError", "ProxyError", "gaierror"}:
        return HubError(f"{word} {name}: the Hub cannot be reached from this machine", PREFETCH)
    if (
        kind == "dataset" and any(type(e).__module__.startswith(("datasets", "pyarrow")) for e in chain)
    ) or "script" in text:
        return InputError(
            f"data set {name}: datasets cannot load it: {_first_line(chain[0])}",
            "see its page; often `revision: refs/convert/parquet` helps, or download it and name `data.files`",
        )
    if _found(chain, errors.LocalEntryNotFoundError):
        return HubError(f"{word} {name}: the Hub cannot be reached from this machine", PREFETCH)
    if _found(chain, errors.HfHubHTTPError):
        return HubError(
            f"{word} {name}: the Hub answers {status}: {_first_line(chain[0])}", "run the same command again later"
        )
    return None


def _found(chain: Sequence[BaseException], kind: type[BaseException]) -> BaseException | None:
    return next((e for e in chain if isinstance(e, kind)), None)


def _status(chain: Sequence[BaseException]) -> int | None:
    for error in chain:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _revisions(kind: str, name: str, revision: str) -> str:
    """What revisions there are, nearest first; one more request, and no remedy is lost if it fails."""
    import huggingface_hub

    try:
        refs = huggingface_hub.HfApi().list_repo_refs(name, repo_type=kind)
    except Exception:
        return "leave `revision` out for the newest, or give a branch, a tag or a commit of 40 hex digits"
    known = [ref.name for ref in (*refs.branches, *refs.tags)]
    hint = nearest(revision, known)
    return f"{hint + ' ' if hint else ''}known: {', '.join(known[:20])}; or a commit of 40 hex digits"
